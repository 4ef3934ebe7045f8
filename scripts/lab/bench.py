"""Time what users wait for. Machines are noisy: everything is timed in turn in one run and given as medians.

    python scripts/lab/bench.py train shakespeare               tokens/s of a preset, beside the sources' recipe
    python scripts/lab/bench.py train tales --rounds 9 --json train.json
    python scripts/lab/bench.py sample stories --batches 1,16   tokens/s of every sampler, beside the sources' procedure
    python scripts/lab/bench.py sample artifacts/models/tales.best.pt --samplers confidence,entropy_bounded:0.03
    python scripts/lab/bench.py video                           seconds to encode 256 tokens x 100 steps as MP4
"""
import contextlib
import dataclasses
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import torch

import config
import diffusion
import train
from config import LONGEST, Config, SampleConfig
from model import Transformer
from scripts.lab import yardstick
from utils import (
    checkpoint,
    cli,
    corpus,
    families,
    optim,
    policies,
    runtime,
    tales,
    tokenizer as tokenizers,
    trace,
    video,
)
from utils.cli import UserError, field

SOURCE = "the sources' recipe, float32 eager"


@dataclass(frozen=True)
class BenchConfig:
    rounds: int = field(7, "timed rounds of each variant", low=1, high=1000)
    warm_up: int = field(1, "rounds before those (train: memory takes several steps to settle)", low=0, high=1000)
    variants: str = field("", "only variants whose name holds this (train)")
    batches: str = field("1,16,64", "rows that are sampled at once (sample)")
    samplers: str = field("", "NAME or NAME:NUMBER, with commas between (sample; default: all)")
    steps: int = field(64, "steps of the samplers that take as many as they are told (sample)", low=1, high=LONGEST)
    json: str = field("", "write the figures to this file too")
    device: str = field("auto", "auto: cuda, else mps, else cpu", choices=("auto", "cpu", "cuda", "mps"))

    def __post_init__(self):
        cli.check(self)
        for name in self.sampler_names():
            policies.find_sampler(name)
        if not all(word.strip().isdecimal() and 1 <= int(word) <= 10_000 for word in self.batches.split(",")):
            raise UserError(f"batches={self.batches}: expected whole numbers up to 10,000 with commas between, as in 1,16")

    def sampler_names(self):
        return [name.strip() for name in self.samplers.split(",") if name.strip()] or list(policies.SAMPLERS)


def training_step(cfg, vocab_size, device, dtype=torch.float32, compiled=False, torchs_muon=False):
    """(function that does one training step of `cfg` on random tokens, with train.py's code, optimizer included, and
    returns how many positions are scored; parameters)."""
    torch.manual_seed(0)
    model = Transformer(cfg, vocab_size).to(device).train()
    family = families.family_of(cfg)
    optimizers, numbers, hardware = optim.make_optimizers(model, cfg, dtype), iter(range(10**9)), runtime.Hardware(device, dtype)
    if torchs_muon:
        optimizers[1] = torch.optim.Muon(optimizers[1].param_groups[0]["params"], cfg.muon_lr)
    x0 = torch.randint(vocab_size - 1, (cfg.batch_size, cfg.seq_len))
    data = corpus.Corpus(batch=lambda step, rows: x0[rows], held_out=None, tokenizer=None, tokens=0, fingerprint="", training=None)

    def step(network, token_nll=diffusion.token_nll):
        batch = train.draw_batch(family, data, next(numbers), hardware)
        train.gradients(network, family, batch, hardware, token_nll)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        runtime.synchronise(device)
        return x0.numel() if cfg.loss_weighting == "full" else sum(len(c.index) for _, c in batch[0])

    if compiled:
        compiled = runtime.compile_network(model, diffusion.token_nll, device, step)
        if not compiled:
            raise UserError("torch.compile does not work here: nothing compiled to time; choose with --variants")
    network, token_nll, _ = compiled or (model, diffusion.token_nll, None)
    return partial(step, network, token_nll), model.num_parameters()


def serve(pipe, keep_memory, *setting):
    """A process of its own for each variant, so that none profits or suffers from another's memory: does as many steps
    as it is told after one that does not count, since the others' turns have emptied the caches, and sends their median
    seconds, positions scored, parameters, and peak memory so far."""
    if keep_memory:
        runtime.keep_memory()
    try:
        step, parameters = training_step(*setting)
        while steps := pipe.recv():
            times = []
            for _ in range(1 + steps):
                start = time.perf_counter()
                scored = step()
                times.append(time.perf_counter() - start)
            pipe.send((statistics.median(times[1:]), scored, parameters, runtime.peak_memory(setting[2])))
    except (UserError, RuntimeError) as error:  # a GPU's memory that is too small, say
        pipe.send(cli.reason(error))
    except EOFError:  # the process that asks has ended
        pass


class Variant:
    """A process that runs `serve`."""

    def __init__(self, label, *setting):
        self.label, context = label, multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, *setting), daemon=True)
        self.process.start()
        there.close()

    def turn(self, steps):
        try:
            self.pipe.send(steps)
            answer = self.pipe.recv()
        except (EOFError, OSError):
            answer = "its process died; it may lack memory"
        if isinstance(answer, str):
            raise UserError(f"{self.label}: {answer}")
        return answer

    def end(self):
        with contextlib.suppress(OSError):  # it has died
            self.pipe.send(0)
        self.process.join()


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seconds_of(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def matrix_rate(device, dtype, size):
    """FLOP/s of size x size matrix products, from the median of five."""
    a = torch.randn(size, size, device=device, dtype=dtype)

    def product():
        a @ a
        runtime.synchronise(device)
    product()
    return 2 * size**3 / statistics.median(seconds_of(product) for _ in range(5))


def model_flops(cfg, vocab_size, scored):
    """FLOPs of a forward and backward pass of a batch: 6 a parameter of the blocks and token, attention, and the head at
    the `scored` positions; nothing for embeddings, norms or what is computed twice."""
    tokens = cfg.batch_size * cfg.seq_len
    blocks = sum(p.numel() for p in Transformer(cfg, vocab_size).blocks.parameters())
    return (6 * blocks + 12 * cfg.n_layer * cfg.n_embd * cfg.seq_len) * tokens + 6 * cfg.n_embd * (vocab_size - 1) * scored


def training_variants(cfg, dtype):
    """Label -> (whether memory is kept, Config, dtype, whether compiled, whether with torch.optim.Muon), in order."""
    shape = {name: getattr(cfg, name) for name in ("n_layer", "n_head", "n_embd", "seq_len", "micro_batch")}
    recipe = cli.merge(Config, config.MICRO, shape, {"loss_weighting": "full"})  # head and loss at all positions
    label, full = runtime.dtype_name(dtype), torch.float32
    variants = {SOURCE: (False, recipe, full, False, False),
                "the same, memory kept": (True, recipe, full, False, False),
                "float32 eager": (True, cfg, full, False, False), "float32 compiled": (True, cfg, full, True, False)}
    if dtype != full:
        variants |= {f"{label} eager": (True, cfg, dtype, False, False), f"{label} compiled": (True, cfg, dtype, True, False)}
    if cfg.optimizer == "muon":
        variants[f"{label} compiled, torch.optim.Muon"] = (True, cfg, dtype, True, True)
    return variants


def time_together(variants, vocab_size, device, matrices, options):
    """(label -> list of answers of `serve`, one a round; median FLOP/s of matrix products), all in turn, each for the
    rows of the largest step."""
    processes = [Variant(label, keep, cfg, vocab_size, device, *rest) for label, (keep, cfg, *rest) in variants.items()]
    answers, rates, most = {label: [] for label in variants}, [], max(cfg.batch_size for _, cfg, *_ in variants.values())
    try:
        for number in range(options.rounds + options.warm_up):
            rates.append(matrix_rate(device, *matrices))
            for process in processes:
                answers[process.label].append(process.turn(most // variants[process.label][1].batch_size))
    finally:
        for process in processes:
            process.end()
    return {label: rows[options.warm_up:] for label, rows in answers.items()}, statistics.median(rates[options.warm_up:])


def bench_train(name, options):
    """Figures (dict) for one preset: the sources' recipe, and what this machine's own choices give, step by step."""
    cfg = dataclasses.replace(cli.merge(Config, config.preset(name)), short_rows=0.0)
    device = runtime.choose_device(options.device)
    dtype = runtime.choose_dtype("auto", device)
    vocab_size = 66 if cfg.tokenizer == "char" else cfg.vocab_size  # of Tiny Shakespeare, or what BPE is trained to
    variants, figures = training_variants(cfg, dtype), {}
    matrices = dtype, 8192 if device.type == "cuda" else 2048
    labels = [label for label in variants if label != SOURCE and options.variants in label]
    if not labels:
        raise UserError(f"variants={options.variants}: no variant's name holds this; known: {', '.join(variants)}")
    tokens = lambda label: variants[label][1].batch_size * variants[label][1].seq_len
    own, timed = f"{runtime.dtype_name(dtype)} compiled", {}
    for label in [SOURCE, *labels] if device.type == "cuda" else labels:
        # beside the sources' recipe, since a machine's speed drifts (torch's Muon beside ours, from which it hardly
        # differs); alone on a GPU, which may lack memory for both
        reference = own if label == f"{own}, torch.optim.Muon" and own in figures else SOURCE
        group = [label] if device.type == "cuda" else [reference, label]
        try:
            answers, rate = time_together({one: variants[one] for one in group}, vocab_size, device, matrices, options)
        except UserError as error:  # a GPU's memory that is too small for one may do for the others
            failed = error
            print(f"left out: {error}", file=sys.stderr)
            continue
        timed |= {one: rows for one, rows in answers.items() if one not in timed}
        base = answers.get(reference) or timed.get(reference)
        known = 1.0 if reference == SOURCE else figures[reference]["speed_up"]
        for one, rows in answers.items():
            if one in figures:  # shown as it was beside the first
                continue
            seconds = statistics.median(row[0] for row in rows)
            flops = model_flops(variants[one][1], vocab_size, rows[-1][1]) / seconds
            figures[one] = {
                "rows_a_step": variants[one][1].batch_size, "median_step_seconds": seconds,
                "tokens_per_second": tokens(one) / seconds,
                "speed_up": base and known and known * tokens(one) / tokens(reference) * statistics.median(
                    a[0] / b[0] for a, b in zip(base, rows)),
                "model_flops_per_second": flops, "matrix_product_flops_per_second": rate,
                "share_of_matrix_rate": flops / rate, "peak_memory_gb": rows[-1][3] / 2**30, "parameters": rows[-1][2]}
    if not figures:
        raise failed
    return {"preset": name, "device": device_name(device), "torch": torch.__version__, "threads": torch.get_num_threads(),
            "seq_len": cfg.seq_len, "vocab_size": vocab_size, "rounds": options.rounds,
            "matrix_product_dtype": runtime.dtype_name(dtype), "matrix_product_size": matrices[1],
            "variants": figures}


def bench_sample(name, options):
    """Figures (dict) for every sampler on a network of the preset's shape with random weights, or a checkpoint (.pt).

    Policies that look at the data take as many NFE as the data ask for (with random weights that says nothing
    about a trained network), first_hitting one a token, all others at most options.steps.
    """
    device = runtime.choose_device(options.device)
    dtype = runtime.choose_dtype("auto", device)
    if name.endswith(".pt"):
        model, _, cfg = checkpoint.restore(checkpoint.read(name), device, name)
    else:
        cfg = cli.merge(Config, config.preset(name))
        torch.manual_seed(0)
        model = Transformer(cfg, cfg.vocab_size if cfg.tokenizer != "char" else 66).to(device).eval()
        torch.nn.init.normal_(model.head.weight, std=0.02)
    rows = []
    for batch in map(int, options.batches.split(",")):
        blank = torch.full((batch, cfg.seq_len), model.vocab_size - 1, device=device)
        blank[:, 0] = 0
        source = lambda: (yardstick.sampler(model, blank), 101)

        def ours(sampler, **more):
            found = policies.find_sampler(sampler)
            steps = None if found.key and found.value is not None else options.steps
            how = SampleConfig(sampler=sampler, steps=steps, top_p=1.0, **more)

            def run():
                with runtime.autocast(device, dtype):
                    *_, last = diffusion.sample(families.family_of(cfg), model, blank, how)
                return last.ids, last.nfe
            return run

        block = cfg.seq_len // 8
        variants = {"source procedure, float32": source} | {name: ours(name) for name in options.sampler_names()} | {
            f"confidence, blocks of {block}": ours("confidence", decode_block=block),
            f"confidence, blocks of {block}, prefix cache": ours("confidence", decode_block=block, cache="prefix"),
            f"confidence, blocks of {block}, dual cache": ours("confidence", decode_block=block, cache="dual")}
        times, nfe, peak = {label: [] for label in variants}, {}, {}
        for number in range(options.rounds + options.warm_up):
            for label, run in variants.items():
                runtime.reset_peak_memory(device)
                start = time.perf_counter()
                nfe[label] = run()[1]
                runtime.synchronise(device)
                if number >= options.warm_up:
                    times[label].append(time.perf_counter() - start)
                peak[label] = runtime.peak_memory(device)
        base = times["source procedure, float32"]
        rows += [{"batch": batch, "sampler": label, "evaluations": nfe[label],
                  "median_seconds": statistics.median(seconds),
                  "tokens_per_second": batch * (cfg.seq_len - 1) / statistics.median(seconds),
                  "speed_up": statistics.median(b / s for b, s in zip(base, seconds)),
                  "peak_memory_gb": peak[label] / 2**30}  # on a CPU: of the process so far
                 for label, seconds in times.items()]
    return {"model": name, "device": device_name(device), "dtype": runtime.dtype_name(dtype), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "window": cfg.seq_len, "parameters": model.num_parameters(),
            "rounds": options.rounds, "rows": rows}


def show_sample(report):
    print(f"{report['model']} on {report['device']} {report['dtype']}, {report['threads']} threads, "
          f"{report['parameters']:,} parameters, {report['window']} tokens")
    for row in report["rows"]:
        print(f"  batch {row['batch']:<3} {row['sampler']:<42} {row['evaluations']:4} evaluations "
              f"{row['median_seconds']:8.2f} s {row['tokens_per_second']:10,.0f} tokens/s  x{row['speed_up']:.2f}  "
              f"{row['peak_memory_gb']:.2f} GB")


def bench_video(name, options):
    """Seconds to encode a trace of 256 tokens and 100 steps, written by a network of the preset's shape."""
    cfg = dataclasses.replace(cli.merge(Config, config.preset(name)), seq_len=256)
    tokenizer = tokenizers.train_bpe(tales.generate("video", 500), 512)
    torch.manual_seed(0)
    model = Transformer(cfg, tokenizer.vocab_size).eval()
    blank = torch.full((1, 256), tokenizer.mask)
    how = SampleConfig(steps=100, sampler="confidence", top_p=1.0)
    frames, steps = trace.record(diffusion.sample(families.family_of(cfg), model, blank, how), blank, tokenizer.mask)
    list(steps)
    with tempfile.TemporaryDirectory() as folder:
        seconds = []
        for _ in range(options.rounds + options.warm_up):
            start = time.perf_counter()
            video.write_mp4(os.path.join(folder, "trace.mp4"), video.pictures(frames, tokenizer, "title"), 100)
            seconds.append(time.perf_counter() - start)
    return {"frames": len(frames), "tokens": 256, "rounds": options.rounds, "threads": torch.get_num_threads(),
            "median_seconds": statistics.median(seconds[options.warm_up:])}


def show_video(report):
    print(f"{report['tokens']} tokens x {report['frames']} frames as MP4: {report['median_seconds']:.1f} s")


def show_train(report):
    size = report["matrix_product_size"]
    print(f"{report['preset']} on {report['device']}, {report['threads']} threads; shares are of the rate of "
          f"{report['matrix_product_dtype']} matrix products, {size} x {size} x {size}")
    for label, f in report["variants"].items():
        print(f"  {label:<38} {f['rows_a_step']:4} rows {f['median_step_seconds'] * 1000:8.0f} ms a step "
              f"{f['tokens_per_second']:10,.0f} tokens/s  x{f['speed_up'] or math.nan:.2f} "
              f"{f['model_flops_per_second'] / 1e9:10,.0f} "
              f"of {f['matrix_product_flops_per_second'] / 1e9:,.0f} GFLOP/s {f['share_of_matrix_rate']:6.1%} "
              f"{f['peak_memory_gb']:6.1f} GB")


BENCHES = {"train": (bench_train, show_train, "tales"), "sample": (bench_sample, show_sample, "stories"),
           "video": (bench_video, show_video, "tales")}


def run(positional, overrides):
    if not positional or positional[0] not in BENCHES:
        raise UserError("say what to time: python scripts/lab/bench.py train [preset ...], sample [preset ...] or video")
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
