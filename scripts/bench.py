"""Time what users wait for. Machines are noisy: everything is timed in turn in one process and given as medians.

    python scripts/bench.py train shakespeare               tokens/s of a preset, beside fp32 eager in the same run
    python scripts/bench.py train tales --rounds 9 --json train.json
"""
import dataclasses
import os
import statistics
import sys
import time
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import config
import diffusion
from config import Config, UserError, field
from model import Transformer
from utils import optim, runtime


@dataclass(frozen=True)
class BenchConfig:
    rounds: int = field(7, "timed rounds of each variant, after one to warm up")
    json: str = field("", "write the figures to this file too")
    device: str = field("auto", "auto: cuda, else mps, else cpu", choices=("auto", "cpu", "cuda", "mps"))

    def __post_init__(self):
        config.check_choices(self)
        if self.rounds < 1:
            raise UserError(f"rounds={self.rounds} must be at least 1")


def training_step(cfg, vocab_size, device, dtype, compiled, masked_only, muon=optim.Muon):
    """A function that does one training step of `cfg` on random tokens, optimizer included.

    masked_only=False computes the head at all positions and takes the loss at the masked ones, as the sources do.
    """
    torch.manual_seed(0)
    model = Transformer(cfg, vocab_size).to(device).train()
    optimizers, steps = optim.make_optimizers(model, cfg, muon), iter(range(10**9))
    x0 = torch.randint(vocab_size - 1, (cfg.batch_size, cfg.block_size), device=device)

    def corruption():
        return diffusion.draw_corruption(cfg, *x0.shape, runtime.generator("bench", next(steps))).to(device)

    def loss(network, drawn):
        if masked_only:
            return diffusion.loss(network, x0, drawn).mean()
        logits = network(diffusion.hide(x0, drawn.masked, vocab_size - 1), drawn.masked.float().mean(1))
        ce = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), x0, reduction="none")
        return ((ce * drawn.masked).sum(1) * drawn.weight / x0.size(1)).mean()

    def step(network):
        with runtime.autocast(device, dtype):
            value = loss(network, corruption())
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        runtime.synchronise(device)

    if compiled:
        model = runtime.maybe_compile(model, dataclasses.replace(cfg, compile="on"), device, 0, step)
    return lambda: step(model)


def bench_train(name, options):
    """Figures (dict) for one preset: the fp32 eager yardstick and what this machine's own choices give."""
    cfg = config.merge(Config, config.preset(name))
    device = runtime.choose_device(options.device)
    dtype = runtime.choose_dtype("auto", device)
    vocab_size = 66 if cfg.tokenizer == "char" else cfg.vocab_size  # of Tiny Shakespeare, or what BPE is trained to
    variants = {"float32 eager, head everywhere": (torch.float32, False, False),
                "float32 eager": (torch.float32, False, True),
                "float32 eager, torch.optim.Muon": (torch.float32, False, True, torch.optim.Muon),
                "float32 compiled": (torch.float32, True, True)}
    if dtype != torch.float32:
        label = str(dtype).removeprefix("torch.")
        variants |= {f"{label} eager": (dtype, False, True), f"{label} compiled": (dtype, True, True)}
    steps = {label: training_step(cfg, vocab_size, device, *variant) for label, variant in variants.items()}
    times = {label: [] for label in steps}
    for number in range(options.rounds + 1):
        for label, step in steps.items():
            start = time.perf_counter()
            step()
            if number:
                times[label].append(time.perf_counter() - start)
    tokens, base = cfg.batch_size * cfg.block_size, times["float32 eager, head everywhere"]
    figures = {label: {"median_step_seconds": statistics.median(seconds),
                       "tokens_per_second": tokens / statistics.median(seconds),
                       "speed_up": statistics.median(b / s for b, s in zip(base, seconds))}
               for label, seconds in times.items()}
    return {"preset": name, "device": device.type, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "bfloat16_in_hardware": runtime.has_bfloat16(device), "batch_size": cfg.batch_size,
            "block_size": cfg.block_size, "rounds": options.rounds, "variants": figures}


def main(argv):
    if "--help" in argv or "-h" in argv:
        return config.show_help(BenchConfig, __doc__)
    positional, overrides = config.parse(argv, BenchConfig)
    if not positional or positional[0] != "train":
        raise UserError("say what to time: python scripts/bench.py train [preset ...]")
    options = config.merge(BenchConfig, overrides)
    reports = []
    for name in positional[1:] or ["tales"]:
        report = bench_train(name, options)
        reports.append(report)
        print(f"{name} on {report['device']}, {report['threads']} threads, bfloat16 in hardware: "
              f"{report['bfloat16_in_hardware']}")
        for label, f in report["variants"].items():
            print(f"  {label:<32} {f['median_step_seconds'] * 1000:8.0f} ms a step  "
                  f"{f['tokens_per_second']:10,.0f} tokens/s  x{f['speed_up']:.2f}")
    if options.json:
        runtime.write_json(options.json, reports)


if __name__ == "__main__":
    config.run(main)
