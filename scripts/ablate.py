"""Comparisons: one table of differences, one figure, one command each. What is done already is not done again.

    python scripts/ablate.py samplers                                  the newest tales run
    python scripts/ablate.py samplers --checkpoint artifacts/models/tales.best.pt --num_samples 200

Writes artifacts/ablations/NAME.csv, .md and .png. To add a comparison, add a function and an entry to COMPARISONS.
"""
import csv
import os
import sys
import time
from dataclasses import dataclass
from typing import Callable, NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import config
import diffusion
from config import Config, SampleConfig, UserError, field
from scripts.bench import source_procedure
from utils import canvas, checkpoint, metrics, plots, runtime, tales


@dataclass(frozen=True)
class AblateConfig:
    checkpoint: str = field("", "of the comparisons that need a trained model (default: the newest run's best)", "what")
    num_samples: int = field(200, "samples of each setting, seeds 0, 1, ...")
    only: str = field("", "only settings whose name begins so")
    out_dir: str = field("artifacts/ablations", "where to write")
    device: str = field("auto", "auto: cuda, else mps, else cpu", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = field("auto", "of matrix products", choices=("auto", "float32", "bfloat16", "float16"))

    def __post_init__(self):
        config.check_choices(self)
        if self.num_samples < 2:
            raise UserError(f"num_samples={self.num_samples} must be at least 2")


class Comparison(NamedTuple):
    settings: Callable  # options -> list of dicts: the settings that are compared, in order
    measure: Callable   # options -> (function from such a dict to a dict of figures, dict of what else they depend on)
    plot: Callable      # (rows of the table, title, path) -> None


# --- samplers on tales, where truth is known --------------------------------------------------------------------

STEPS = (4, 8, 16, 32, 64)
MORE_STEPS = (*STEPS, 128, 256)  # for the samplers that gain from more steps than there are tokens
# rules that choose their number of steps themselves
NUMBERS = {"threshold": (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99), "factor": (0.3, 0.5, 1.0, 1.5, 2.0, 3.0),
           "entropy_bounded": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), "local_entropy": (11, 17, 22, 33, 48)}


def sampler_settings(options):
    """Every sampler over its own range of cost: steps, or the rule's number; and what cutting off unlikely tokens does."""
    rows = []
    for name, rule in diffusion.SAMPLERS.items():
        if name in NUMBERS:
            rows += [{"sampler": f"{name}:{number:g}", "steps": "", "decode_block": 0} for number in NUMBERS[name]]
        elif name == "first_hitting":
            rows.append({"sampler": name, "steps": "", "decode_block": 0})
        else:
            several = MORE_STEPS if name == "ancestral" or name.startswith("remdm") else (*STEPS, "")  # "": one a token
            rows += [{"sampler": name, "steps": steps, "decode_block": 0} for steps in several]
    rows += [{"sampler": "confidence", "steps": steps, "decode_block": 16} for steps in (*STEPS, "")]
    rows += [{"sampler": "source", "steps": steps, "decode_block": 0} for steps in (4, 8, 16, 32, 64, 101)]
    rows = [row | {"cache": "none", "top_p": 1.0} for row in rows]
    best = {"sampler": SampleConfig.sampler, "steps": "", "decode_block": 0, "cache": "none"}
    rows += [best | {"top_p": share} for share in (0.9, 0.95, 0.98, 0.99)]
    best["decode_block"] = 16
    return rows + [best | {"cache": cache, "top_p": SampleConfig.top_p} for cache in ("none", "prefix", "dual")]


def judge_samplers(options):
    """(function from a setting to its figures, with one tales model for all; what the figures depend on besides)."""
    path = options.checkpoint or checkpoint.newest(os.path.join(Config.out_dir, "models"))
    state, device = checkpoint.read(path), runtime.choose_device(options.device)
    model, text, cfg = checkpoint.restore(state, device, path)
    if cfg.data != "tales":
        raise UserError(f"{path} was trained on {cfg.data}; samplers are judged on tales: python train.py tales")
    dtype = runtime.choose_dtype(options.dtype, device)

    def measure(setting):
        rows, per_row, seconds = [], 0, 0.0
        for seeds in torch.arange(options.num_samples).split(100):
            blank = torch.tensor([canvas.build(text, [None], cfg.block_size)] * len(seeds), device=device)
            start = time.perf_counter()
            with runtime.autocast(device, dtype):
                if setting["sampler"] == "source":
                    ids, asked = source_procedure(model, blank, setting["steps"], int(seeds[0])), setting["steps"]
                    per_row += asked * len(seeds)
                else:
                    steps = diffusion.sample(model, blank, sampler=setting["sampler"], steps=setting["steps"] or None,
                                             decode_block=setting["decode_block"], cache=setting["cache"],
                                             top_p=setting["top_p"], seeds=seeds.tolist())
                    *_, last = steps
                    ids, per_row = last.ids, per_row + int(last.row_evaluations.sum())
            runtime.synchronise(device)
            seconds += time.perf_counter() - start
            rows += ids.tolist()
        stories = [story for row in rows for story in canvas.documents(text, row, cfg.rows)]
        figures = metrics.judge_tales(stories) | metrics.diversity(stories)
        return {"evaluations": per_row / options.num_samples} | figures | {
            "entropy": tales.entropy(), "seconds_a_sample": seconds / options.num_samples}
    return measure, {"num_samples": options.num_samples, "model": f"{cfg.name} {state['step']} {state['nll']:.4f}",
                     "dtype": str(dtype).removeprefix("torch.")}


COMPARISONS = {
    "samplers": Comparison(sampler_settings, judge_samplers, plots.quality_against_cost),
}


# --- the runner -------------------------------------------------------------------------------------------------


def label(setting):
    return ", ".join(f"{key} {value}" for key, value in setting.items() if value not in ("", 0, "none", 1.0))


def read_table(path):
    """Rows (list of dicts of str) of a table that an earlier run wrote, [] if there is none."""
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_tables(rows, stem):
    """The rows as CSV and as Markdown, each replaced as a whole."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    try:
        os.makedirs(os.path.dirname(stem) or ".", exist_ok=True)
        with open(f"{stem}.csv.tmp", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        with open(f"{stem}.md.tmp", "w", encoding="utf-8") as file:
            for cells in (columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)):
                file.write("| " + " | ".join(map(str, cells)) + " |\n")
        for ending in ("csv", "md"):
            os.replace(f"{stem}.{ending}.tmp", f"{stem}.{ending}")
    except OSError as error:
        raise UserError(f"cannot write {stem}: {error}") from None


def rounded(value):
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def main(argv):
    if "--help" in argv or "-h" in argv:
        return config.show_help(AblateConfig, __doc__)
    positional, overrides = config.parse(argv, AblateConfig)
    if len(positional) != 1:
        raise UserError(f"say which comparison: python scripts/ablate.py NAME; known: {', '.join(COMPARISONS)}")
    config.check_name("comparison", positional[0], COMPARISONS)
    options = config.merge(AblateConfig, overrides)
    comparison, stem = COMPARISONS[positional[0]], os.path.join(options.out_dir, positional[0])
    (measure, common), table = comparison.measure(options), read_table(f"{stem}.csv")
    common = {name: str(value) for name, value in common.items()}
    mine = lambda row: all(row.get(name) == value for name, value in common.items())  # and not of another model
    settings = [s for s in comparison.settings(options) if str(next(iter(s.values()))).startswith(options.only)]
    if not settings:
        raise UserError(f"only={options.only}: no setting of {positional[0]} begins so")
    for number, setting in enumerate(settings, 1):
        key = {name: str(value) for name, value in setting.items()} | common
        if any(all(row.get(name) == value for name, value in key.items()) for row in table):
            continue
        figures = measure(setting)
        row = key | {name: rounded(value) for name, value in figures.items()}
        table.append(row)
        write_tables(table, stem)
        print(f"{number} of {len(settings)}: {label(setting)} | " + ", ".join(
            f"{name} {row[name]}" for name in list(figures)[:6]), flush=True)
    comparison.plot([row for row in table if mine(row)], positional[0], f"{stem}.png")
    print(f"wrote {stem}.csv, {stem}.md and {stem}.png")


if __name__ == "__main__":
    config.run(main)
