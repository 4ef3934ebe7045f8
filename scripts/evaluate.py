"""Judge a checkpoint: the final metrics block of its training run, or that of another text, each number with its unit.

    python scripts/evaluate.py                                      the newest run's best checkpoint
    python scripts/evaluate.py --checkpoint artifacts/models/tales.best.pt --num_samples 200 --json report.json
    python scripts/evaluate.py --data my.txt                        a text of your own, all of it held out
    python scripts/evaluate.py --judge artifacts/models/ar.best.pt  its samples, scored by an autoregressive model
    python scripts/evaluate.py --against artifacts/models/ar.best.pt   two models on the same rows, where they compare
"""
import dataclasses
import math
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import diffusion
from config import Config, SampleConfig
from utils import checkpoint, cli, corpus, metrics, plots, runtime, texts
from utils.cli import UserError, field


@dataclass(frozen=True)
class EvaluateConfig:
    checkpoint: str = field("", "path (default: the newest run's best)", "what")
    data: str = field("", "a text of your own instead of the run's held-out part")
    rows: int = field(None, "held-out rows (default: the run's final_rows)")
    num_samples: int = field(None, "unconditional samples, seeds 0, 1, ...; 0: none (default: the run's final_samples)")
    left_to_right: int = field(0, "rows whose exact likelihood is computed, written from left to right: one evaluation a token")
    judge: str = field("", "autoregressive checkpoint that scores the samples too")
    against: str = field("", "a checkpoint to compare with, on the same held-out text")
    json: str = field("", "write the report to this file too")
    plot: str = field("", "write loss, entropy and accuracy over the noise level to this PNG")
    sampler: str = field(SampleConfig.sampler, "rule that picks what to write next", "how")
    steps: int = field(None, "most steps (default: as many as there are tokens to write)")
    temperature: float = field(SampleConfig.temperature, "of the token distribution")
    top_p: float = field(SampleConfig.top_p, "draw from the likeliest tokens that sum to this (1: all)")
    device: str = field("auto", "auto: cuda, else mps, else cpu", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = field("auto", "of matrix products", choices=("auto", "float32", "bfloat16", "float16"))

    def __post_init__(self):
        cli.check_choices(self)
        for name, least in (("num_samples", 0), ("rows", 1), ("steps", 1), ("left_to_right", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        diffusion.find_sampler(self.sampler)
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"temperature={self.temperature} must not be negative, and top_p={self.top_p} in (0, 1]")


def load(path, options, device):
    """(model, Config, Corpus, step) of the checkpoint at `path`, with the text and the rows that the options ask for."""
    state = checkpoint.read(path)
    model, text, cfg = checkpoint.restore(state, device, path)
    cfg = dataclasses.replace(cfg, final_rows=options.rows or cfg.final_rows)
    if options.data:
        if not os.path.isfile(options.data):
            raise UserError(f"there is no file {options.data}")
        training = None  # what the run was trained on need not be at hand
        if cfg.data == "tales" or os.path.exists(cfg.data):
            training = corpus.load(cfg, text).training
        cfg = dataclasses.replace(cfg, data=options.data)
        rows = corpus.held_out_rows(texts.read_documents(options.data), text, cfg)
        return model, cfg, corpus.Corpus(None, rows, text, 0, "", training), state["step"]
    return model, cfg, corpus.load(cfg, text), state["step"]


def compare(first, second, device, dtype):
    """What the bounds of two models, each (path, model, Config, Corpus), say of each other: a list of lines.

    The same rows of the same tokens compare by nats a token, row by row; the same text in other tokens or windows by bits
    per character alone; different texts not at all.
    """
    figures, lines = [], []
    for path, model, cfg, data in (first, second):
        with runtime.autocast(device, dtype):
            nll = diffusion.bound(model, data.held_out[: cfg.final_rows].to(device), cfg.final_masks, cfg, cfg.micro_batch or 64)
        lengths = corpus.row_lengths(data.held_out[: cfg.final_rows], data.text)[:, 0]
        bits = nll.sum(0).mean().item() * cfg.block_size / math.log(2) / lengths.sum().item()
        kind = "exactly" if cfg.objective == "ar" else "at most"
        lines.append(f"{path}: {kind} {nll.mean().item():.4f} nats a token, {bits:.4f} bits per character ({len(nll)} rows of "
                     f"{cfg.block_size} tokens of {cfg.data})")
        figures.append((cfg, data, nll.mean(1), bits))
    (cfg, data, nll, bits), (other, theirs, their_nll, their_bits) = figures
    same_tokens = data.text.to_json() == theirs.text.to_json()
    decoded = [data.text.decode(row) for row in data.held_out[: cfg.final_rows].tolist()]
    their_decoded = [theirs.text.decode(row) for row in theirs.held_out[: other.final_rows].tolist()]
    if same_tokens and decoded == their_decoded:
        difference = nll - their_nll
        error = difference.std().item() / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
        lines.append(f"the same rows: the first has {difference.mean().item():+.4f} ± {error:.4f} nats a token (s.e. over rows, in "
                     "pairs)")
    elif (a := "".join(decoded)) and (b := "".join(their_decoded)) and (a.startswith(b) or b.startswith(a)):
        lines.append(f"the same text in other tokens or windows, so nats a token do not compare; the first has {bits - their_bits:+.4f} "
                     "bits per character (windows differ in context, and end at different places)")
    else:
        lines.append("not comparable: the held-out texts differ; evaluate both with the same --data")
    return lines


def main(argv):
    if "--help" in argv or "-h" in argv:
        return cli.show_help(EvaluateConfig, __doc__)
    positional, overrides = cli.parse(argv, EvaluateConfig)
    if positional:
        raise UserError(f"what is {positional[0]}? Name the model with --checkpoint {positional[0]}")
    options = cli.merge(EvaluateConfig, overrides)
    path = options.checkpoint or checkpoint.newest(os.path.join(Config.out_dir, "models"))
    device = runtime.choose_device(options.device)
    dtype = runtime.choose_dtype(options.dtype, device)
    model, cfg, data, step = load(path, options, device)
    if options.against:
        other = load(options.against, options, device)
        return print("\n".join(compare((path, model, cfg, data), (options.against, *other[:3]), device, dtype)))
    judge = None
    if options.judge:
        judge = checkpoint.restore(checkpoint.read(options.judge), device, options.judge)
        if judge[2].objective != "ar":
            raise UserError(f"{options.judge} has objective={judge[2].objective}; a judge must give exact likelihoods: ar")
    if options.left_to_right and cfg.objective == "uniform":
        raise UserError("left_to_right with objective=uniform: such a model does not write from left to right")
    samples = cfg.final_samples if options.num_samples is None else options.num_samples
    sampling = {name: getattr(options, name) for name in ("sampler", "steps", "temperature", "top_p")}
    report = {"checkpoint": path, "step": step, "sampling": ", ".join(f"{k} {v}" for k, v in sampling.items() if v is not None)}
    with runtime.autocast(device, dtype):
        report |= metrics.held_out(model, cfg, data, device)
    report |= metrics.final(model, cfg, data, device, dtype, step, samples, judge, sampling)
    if options.left_to_right:
        rows = data.held_out[: options.left_to_right].to(device)
        with runtime.autocast(device, dtype):
            exact = metrics.left_to_right(model, cfg, rows)
            bound = diffusion.bound(model, rows, 64, cfg, cfg.micro_batch or 64).mean(1)
        report |= {"left_to_right_nats_per_token": exact.mean().item(), "left_to_right_rows": len(rows),
                   "left_to_right_se_rows": exact.std().item() / math.sqrt(len(rows)) if len(rows) > 1 else math.nan,
                   "bound_of_the_same_rows": bound.mean().item()}
    print(metrics.show(report))
    if options.json:
        runtime.write_json(options.json, report)
    if options.plot:
        plots.levels(report["levels"], path, options.plot)


if __name__ == "__main__":
    cli.run(main)
