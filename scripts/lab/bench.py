"""Time what users wait for. Machines are noisy: everything is timed in turn in one run and given as
medians.

    # tokens/s of a preset, beside the micro-dLLMs' recipe
    python scripts/lab/bench.py train shakespeare
    python scripts/lab/bench.py train tales --rounds 9 --json train.json
    # tokens/s of every sampler, beside the micro-dLLMs' procedure; of some, with a checkpoint
    python scripts/lab/bench.py sample stories --batches 1,16
    python scripts/lab/bench.py sample artifacts/models/tales.best.pt --samplers confidence,factor
    # seconds and memory of a step over the window, the rows, the width and the corpus
    python scripts/lab/bench.py growth --json growth.json
    # seconds to encode 256 tokens x 100 steps as MP4
    python scripts/lab/bench.py video
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import torch

import diffusion
from config import DEVICES, LONGEST, Config, SampleConfig
from model import Transformer
from scripts.lab import bench_growth, bench_training, yardstick
from utils import checkpoint, cli, families, policies, runtime, settings, tales, trace, video
from utils import tokenizer as tokenizers
from utils.cli import UserError, field

SOURCE = "the micro-dLLMs' procedure, float32"  # what samplers are compared with


@dataclass(frozen=True)
class BenchConfig:
    rounds: int = field(7, "timed rounds of each variant", low=1, high=1000)
    warm_up: int = field(
        1, "rounds before those (train: memory takes several steps to settle)", low=0, high=1000
    )
    variants: str = field("", "only variants whose name holds this (train)")
    batches: str = field("1,16,64", "rows that are sampled at once (sample)")
    samplers: str = field("", "NAME or NAME:NUMBER, with commas between (sample; default: all)")
    steps: int = field(
        64, "steps of the samplers that take as many as they are told (sample)", low=1, high=LONGEST
    )
    json: str = field("", "write the figures to this file too")
    device: str = field("auto", "auto: cuda, else mps, else cpu", choices=DEVICES)

    def __post_init__(self):
        cli.check(self)
        for name in self.sampler_names():
            policies.find_sampler(name)
        if not all(
            word.strip().isdecimal() and 1 <= int(word) <= 10_000
            for word in self.batches.split(",")
        ):
            raise UserError(
                f"batches={self.batches}: expected whole numbers up to 10,000 with commas between, "
                "as in 1,16"
            )

    def sampler_names(self):
        return [name.strip() for name in self.samplers.split(",") if name.strip()] or list(
            policies.SAMPLERS
        )


def network_of(name, device):
    """(model, Config): a checkpoint (.pt), or random weights in the shape of a preset."""
    if name.endswith(".pt"):
        model, _, cfg = checkpoint.restore(checkpoint.read(name), device, name)
        return model, cfg
    cfg = cli.merge(Config, settings.preset(name))
    torch.manual_seed(0)
    model = Transformer(cfg, cfg.vocab_size if cfg.tokenizer != "char" else 66)
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model.to(device).eval(), cfg


def samplers_of(model, cfg, blank, dtype, options):
    """Label -> function that denoises blank (B, L) and returns the NFE."""
    family, block = families.family_of(cfg), cfg.seq_len // 8

    def source():
        yardstick.sampler(model, blank)
        return 101

    def ours(sampler, **more):
        found = policies.find_sampler(sampler)
        steps = None if found.key and found.value is not None else options.steps
        how = SampleConfig(sampler=sampler, steps=steps, top_p=1.0, **more)
        with runtime.autocast(blank.device, dtype):
            *_, last = diffusion.sample(family, model, blank, how)
        return last.nfe

    in_blocks = partial(ours, "confidence", decode_block=block)
    return (
        {SOURCE: source}
        | {name: partial(ours, name) for name in options.sampler_names()}
        | {
            f"confidence, blocks of {block}": in_blocks,
            f"confidence, blocks of {block}, prefix cache": partial(in_blocks, cache="prefix"),
            f"confidence, blocks of {block}, dual cache": partial(in_blocks, cache="dual"),
        }
    )


def time_in_turn(samplers, options, device):
    """Label -> (seconds of each round, NFE, bytes of memory at most: on a CPU of the process so
    far), of samplers that are timed one after the other in each round."""
    times, nfe, peak = {label: [] for label in samplers}, {}, {}
    for number in range(options.rounds + options.warm_up):
        for label, run in samplers.items():
            runtime.reset_peak_memory(device)
            start = time.perf_counter()
            nfe[label] = run()
            runtime.synchronise(device)
            if number >= options.warm_up:
                times[label].append(time.perf_counter() - start)
            peak[label] = runtime.peak_memory(device)
    return {label: (times[label], nfe[label], peak[label]) for label in samplers}


def bench_sample(name, options):
    """Figures (dict) for every sampler on a network of the preset's shape with random weights, or a
    checkpoint (.pt).

    Policies that look at the data take as many NFE as the data ask for (with random weights that
    says nothing about a trained network), first_hitting one a token, all others at most
    options.steps.
    """
    device = runtime.choose_device(options.device)
    dtype = runtime.choose_dtype("auto", device)
    model, cfg = network_of(name, device)
    rows = []
    for batch in map(int, options.batches.split(",")):
        blank = torch.full((batch, cfg.seq_len), model.vocab_size - 1, device=device)
        blank[:, 0] = 0
        timed = time_in_turn(samplers_of(model, cfg, blank, dtype, options), options, device)
        base, *_ = timed[SOURCE]
        rows += [
            {
                "batch": batch,
                "sampler": label,
                "nfe": nfe,
                "median_seconds": statistics.median(seconds),
                "tokens_per_second": batch * (cfg.seq_len - 1) / statistics.median(seconds),
                "speed_up": statistics.median(b / s for b, s in zip(base, seconds)),
                "peak_memory_gb": peak / 2**30,
            }
            for label, (seconds, nfe, peak) in timed.items()
        ]
    return {
        "model": name,
        "device": bench_training.device_name(device),
        "dtype": runtime.dtype_name(dtype),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "window": cfg.seq_len,
        "parameters": model.num_parameters(),
        "rounds": options.rounds,
        "rows": rows,
    }


def show_sample(report):
    print(
        f"{report['model']} on {report['device']} {report['dtype']}, {report['threads']} threads, "
        f"{report['parameters']:,} parameters, {report['window']} tokens"
    )
    for row in report["rows"]:
        print(
            f"  batch {row['batch']:<3} {row['sampler']:<42} {row['nfe']:4} NFE "
            f"{row['median_seconds']:8.2f} s {row['tokens_per_second']:10,.0f} tokens/s  "
            f"x{row['speed_up']:.2f}  {row['peak_memory_gb']:.2f} GB"
        )


def bench_video(name, options):
    """Seconds to encode a trace of 256 tokens and 100 steps, written by a network of the preset's
    shape."""
    cfg = dataclasses.replace(cli.merge(Config, settings.preset(name)), seq_len=256)
    tokenizer = tokenizers.train_bpe(tales.generate("video", 500), 512)
    torch.manual_seed(0)
    model = Transformer(cfg, tokenizer.vocab_size).eval()
    blank = torch.full((1, 256), tokenizer.mask)
    how = SampleConfig(steps=100, sampler="confidence", top_p=1.0)
    frames, steps = trace.record(
        diffusion.sample(families.family_of(cfg), model, blank, how), blank, tokenizer.mask
    )
    list(steps)
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for _ in range(options.rounds + options.warm_up):
            start = time.perf_counter()
            video.write_mp4(
                os.path.join(folder, "trace.mp4"), video.pictures(frames, tokenizer, "title"), 100
            )
            seconds.append(time.perf_counter() - start)
    return {
        "frames": len(frames),
        "tokens": 256,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "median_seconds": statistics.median(seconds[options.warm_up :]),
    }


def show_video(report):
    print(
        f"{report['tokens']} tokens x {report['frames']} frames as MP4: "
        f"{report['median_seconds']:.1f} s"
    )


BENCHES = {
    "train": (bench_training.bench_train, bench_training.show_train, "tales"),
    "sample": (bench_sample, show_sample, "stories"),
    "video": (bench_video, show_video, "tales"),
    "growth": (bench_growth.bench_growth, bench_growth.show_growth, "stories_small"),
}


def run(positional, overrides):
    if not positional or positional[0] not in BENCHES:
        raise UserError(
            "say what to time: python scripts/lab/bench.py train [preset ...], sample "
            "[preset ...], growth or video"
        )
    options, reports = cli.merge(BenchConfig, overrides), []
    bench, show, default = BENCHES[positional[0]]
    for name in positional[1:] or [default]:
        reports.append(bench(name, options))
        show(reports[-1])
    if options.json:
        runtime.write_json(options.json, reports)


main = cli.command(BenchConfig, run, __doc__)
if __name__ == "__main__":
    cli.run(main)
