"""Judge a checkpoint: the final metrics block of its training run, or that of another text, each
number with its unit.

    # the newest run's best checkpoint; another, whose report is a file too
    python scripts/evaluate.py
    python scripts/evaluate.py --checkpoint artifacts/models/tales.best.pt --json report.json
    # a text of your own, all of it held out
    python scripts/evaluate.py --data my.txt
    # its samples, scored by an autoregressive model
    python scripts/evaluate.py --judge artifacts/models/ar.best.pt
    python scripts/evaluate.py --judge hf:gpt2-large
    # two models on the same rows, where they compare
    python scripts/evaluate.py --against artifacts/models/ar.best.pt
"""

import contextlib
import dataclasses
import math
import os
import sys
from dataclasses import dataclass
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from config import DEVICES, DTYPES, LONGEST, Config, SampleConfig
from model import Transformer
from utils import (
    checkpoint,
    cli,
    corpus,
    encoding,
    families,
    judges,
    metrics,
    pairs,
    plots,
    policies,
    ranks,
    runtime,
    texts,
)
from utils.built_in import BUILT_IN
from utils.cli import UserError, field

# options that are SampleConfig's too
HOW = ("sampler", "steps", "temperature", "final_temperature", "top_p")
# options that --against leaves idle
NOT_AGAINST = ("num_samples", "left_to_right", "judge", "json", "plot", *HOW)


@dataclass(frozen=True)
class EvaluateConfig:
    checkpoint: str = field(
        "", "file, folder or hf:USER/NAME (default: as inference.py has it)", "what"
    )
    data: str = field("", "a text of your own instead of the run's held-out part")
    rows: int = field(None, "held-out rows (default: the run's final_rows; of --data all)", low=1)
    num_samples: int = field(
        None,
        "unconditional samples, seeds 0, 1, ...; 0: none (default: the run's final_samples)",
        low=0,
        high=10**5,
    )
    left_to_right: int = field(
        0, "rows whose exact likelihood is computed, from left to right: one NFE a token", low=0
    )
    judge: str = field(
        "",
        "autoregressive model that scores the samples too: a checkpoint, or another model of the "
        "Hugging Face hub, hf:gpt2-large say",
    )
    against: str = field("", "a checkpoint to compare with, on the same held-out text")
    json: str = field("", "write the report to this file too")
    plot: str = field("", "write loss, entropy and accuracy over the noise level to this PNG")
    sampler: str = field(
        None,
        "policy that says what is unmasked next (default of this and the next four: the "
        "checkpoint's)",
        "how",
    )
    steps: int = field(None, "most steps; uniform noise takes as many", low=1, high=LONGEST)
    temperature: float = field(
        None,
        "of the token distribution; 0.8:0.4 falls over the steps",
        low=0,
        ramp="final_temperature",
    )
    final_temperature: float = field(None, "what the temperature falls to", low=0)
    top_p: float = field(
        None, "draw from the likeliest tokens that sum to this (1: all)", above=0, high=1
    )
    device: str = field("auto", "auto: cuda, else mps, else cpu", choices=DEVICES)
    dtype: str = field("auto", "of matrix products; auto: as the model was trained", choices=DTYPES)

    def __post_init__(self):
        cli.check(self)
        if self.sampler:
            policies.find_sampler(self.sampler, policies.SAMPLERS | policies.UNIFORM_SAMPLERS)


class Loaded(NamedTuple):
    """A checkpoint, with the text and the rows that the options ask for."""

    path: str
    model: Transformer
    cfg: Config
    data: encoding.Corpus
    step: int
    dtype: torch.dtype  # in which it is judged
    sampling: dict  # how its author wanted it sampled, SampleConfig's group "how"


def load(path, options, device):
    """The checkpoint at `path` as `Loaded`."""
    state = checkpoint.read(path)
    model, tokenizer, cfg = checkpoint.restore(state, device, path)
    loaded = Loaded(
        path,
        model,
        cfg,
        None,
        state["step"],
        runtime.dtype_of_run(options.dtype, cfg.dtype, device, path),
        checkpoint.sample_defaults() | checkpoint.sampling(state, path),
    )
    cfg = dataclasses.replace(cfg, final_rows=options.rows or cfg.final_rows)
    if options.data:
        if not os.path.isfile(options.data):
            raise UserError(f"there is no file {options.data}")
        training = None
        # what the run was trained on need not be at hand, nor be whole
        if cfg.data in BUILT_IN or os.path.exists(cfg.data):
            with contextlib.suppress(UserError):
                training = corpus.load(cfg, tokenizer).training
        cfg = dataclasses.replace(cfg, data=options.data, held_out="")
        read = pairs.read if cfg.rows == "pair" else texts.read_documents
        rows = encoding.held_out_rows(read(options.data), tokenizer, cfg)
        cfg = dataclasses.replace(cfg, final_rows=options.rows or len(rows))
        return loaded._replace(
            cfg=cfg, data=encoding.Corpus(None, rows, tokenizer, 0, "", training)
        )
    data = corpus.load(cfg, tokenizer)
    if state.get("corpus") not in (None, data.fingerprint):
        print(
            f"{cfg.data} is not the text that {path} was trained on, so its figures are others "
            "than those of its training",
            file=sys.stderr,
        )
    return loaded._replace(cfg=cfg, data=data)


def compare(first, second, device):
    """What the bounds of two models (`Loaded`) say of each other: a list of lines.

    The same rows of the same tokens compare by nats per token, row by row. Other tokens or windows
    of the same text compare by bits per character at best, which windows change too: both are
    printed, and no difference. Different texts do not.
    """
    lines, bounds, texts_of = [], [], []
    for path, model, cfg, data, _, dtype, _ in (first, second):
        rows = data.held_out[: cfg.final_rows]
        with runtime.autocast(device, dtype):
            family = families.family_of(cfg)
            rows_on = (data.tokenizer, rows.to(device))
            nll = metrics.bound(model, family, *rows_on, cfg.final_masks).mean(1)
        said = encoding.without_given(rows, data.tokenizer, cfg)
        text = data.tokenizer.decode(said.flatten().tolist())
        tokens = encoding.count_tokens(rows, data.tokenizer, cfg).sum().item()
        bits = nll.mean().item() * tokens / math.log(2) / len(text)
        lines.append(
            f"{path}: {'exactly' if family.exact else 'at most'} {nll.mean().item():.4f} nats per "
            f"token, {bits:.4f} bits per character ({len(nll)} rows of {cfg.seq_len} tokens, "
            f"{len(text):,} characters, of {cfg.data})"
        )
        bounds.append(nll)
        texts_of.append(text)
    mine, theirs = first.data, second.data
    n = min(map(len, bounds))
    if mine.tokenizer.to_json() == theirs.tokenizer.to_json() and torch.equal(
        mine.held_out[:n], theirs.held_out[:n]
    ):
        difference = bounds[0][:n] - bounds[1][:n]
        error = difference.std().item() / math.sqrt(n) if n > 1 else math.nan
        lines.append(
            f"on the {n} rows that both have: the first has {difference.mean().item():+.4f} ± "
            f"{error:.4f} nats per token (s.e. over rows, in pairs)"
        )
    elif texts_of[0].startswith(texts_of[1][:1000]) or texts_of[1].startswith(texts_of[0][:1000]):
        lines.append(
            "the same text in other tokens or windows: nats per token do not compare; bits per "
            "character do as far as the same part is scored and the windows give as much context"
        )
    else:
        lines.append(
            "not comparable: the held-out texts differ; evaluate both with the same --data"
        )
    return lines


def sampling(loaded, family, options):
    """How the samples are generated: (SampleConfig, a line that says so)."""
    asked = {name: getattr(options, name) for name in HOW}
    asked = {name: value for name, value in asked.items() if value is not None}
    how = cli.merge(SampleConfig, loaded.sampling, asked)
    if "sampler" in asked:
        families.check_sampler(family, how)
    named = {name: getattr(how, name) for name in HOW}
    named["sampler"] = family.sampler_name(how)
    return how, ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)


def left_to_right(loaded, family, count, device):
    """Figures (dict) of `count` rows that the network generates from left to right, and the bound
    of the same rows."""
    rows = loaded.data.held_out[:count].to(device)
    if loaded.cfg.rows == "pair":
        raise UserError("left_to_right is not for a model of pairs")
    exact = metrics.left_to_right(loaded.model, family, rows)
    bound = family.nelbo(loaded.model, rows, 64)
    mean, error, _ = metrics.mean_and_errors(exact[:, None])
    return {
        "left_to_right_nats_per_token": mean,
        "left_to_right_rows": len(rows),
        "left_to_right_se_rows": error,
        "bound_of_the_same_rows": bound.mean().item(),
    }


def evaluate(loaded, options, device):
    """The report (dict) on a checkpoint (`Loaded`)."""
    family = families.family_of(loaded.cfg)
    cli.check_needs(family, options)
    count = loaded.cfg.final_samples if options.num_samples is None else options.num_samples
    if options.judge and not count:
        raise UserError("judge scores samples, and there are none; say how many: --num_samples 64")
    judge = judges.load(options.judge, device, options.dtype) if options.judge else None
    how, in_words = sampling(loaded, family, options)
    report = {
        "checkpoint": loaded.path,
        "step": loaded.step,
        "dtype": runtime.dtype_name(loaded.dtype),
        "sampling": in_words,
    }
    hardware = ranks.Hardware(device, loaded.dtype)
    with hardware.autocast():
        report |= metrics.held_out(loaded.model, family, loaded.data, device)
    report |= metrics.final(
        loaded.model, family, loaded.data, hardware, loaded.step, count, how, judge
    )
    if options.left_to_right:
        with hardware.autocast():
            report |= left_to_right(loaded, family, options.left_to_right, device)
    return report


def run(positional, overrides):
    options = cli.merge(EvaluateConfig, overrides)
    if options.against and (idle := [name for name in NOT_AGAINST if name in overrides]):
        raise UserError(
            "against compares bounds and prints them, nothing else; leave out "
            f"--{', --'.join(idle)}"
        )
    device = runtime.choose_device(options.device)
    loaded = load(options.checkpoint or checkpoint.default(), options, device)
    if options.against:
        return print("\n".join(compare(loaded, load(options.against, options, device), device)))
    report = evaluate(loaded, options, device)
    print(metrics.show(report))
    if options.json:
        runtime.write_json(options.json, report)
    if options.plot:
        try:
            plots.levels(report["levels"], loaded.path, options.plot)
        except ImportError as error:
            raise UserError(f"no plot: {error}; the rest was written") from None


main = cli.command(EvaluateConfig, run, __doc__, unexpected="Name the model with --checkpoint {}")
if __name__ == "__main__":
    cli.run(main)
