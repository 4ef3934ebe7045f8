"""Training runs, compared: the comparisons of scripts/lab/ablate.py that train, which runs them.

The variants of each stand in variants.py; here are the settings of the table, a run a variant and
seed, and what is measured of a run. All are judged by the same bound, on the same held-out rows
with the same masks.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import statistics
import tempfile
from typing import NamedTuple
from unittest import mock

import torch

import train
from config import Config
from scripts.lab import variants
from utils import checkpoint, cli, families, ranks, runtime
from utils.cli import UserError


def rounded(value):
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def variant_config(comparison, options, variant, seed):
    changes = variants.TRAINED[comparison](options)[variant]
    cfg = cli.merge(Config, variants.base_config(options), changes, {"seed": seed})
    points = max(1, cfg.max_iters // 15) if cfg.max_iters else cfg.eval_interval
    return dataclasses.replace(cfg, eval_interval=points, save_interval=10**9)


TABLES = {"seq_len": "block_size"}  # as the tables that are there call it
# what all was before these were settings
LATER = {"objective": "masked", "time_sampling": "uniform", "track": "none"}


def train_settings(comparison, options):
    """One training run each. "config" tells runs apart that differ in anything but their names and
    seeds."""

    # of what is switched on, so that a setting which is added to config.py changes nothing
    def fingerprint(cfg):
        on = [
            (TABLES.get(k, k), v)
            for k, v in dataclasses.asdict(cfg).items()
            if v and k != "seed" and LATER.get(k) != v
        ]
        return hashlib.sha256(repr(on).encode()).hexdigest()[:8]

    def setting(name, seed):
        cfg = variant_config(comparison, options, name, seed)
        dtype = runtime.choose_dtype(cfg.dtype, runtime.choose_device(cfg.device))
        return {
            "variant": name,
            "seed": seed,
            "config": fingerprint(cfg),
            "dtype": runtime.dtype_name(dtype),
        }

    return [
        setting(name, seed)
        for name in variants.TRAINED[comparison](options)
        for seed in range(1, options.seeds + 1)
    ]


def run_variant(cfg, look=lambda path: {}, own=variants.OWN_FAMILIES):
    """(report, entries of the log) of a training run; None where its loss became infinite. look: a
    function from the path of its checkpoint to further entries (dict) of the report; own: families
    (dict) beside those of `families.FAMILIES`."""
    # what an earlier variant's shapes taught the compiler would make this one's steps slower
    torch._dynamo.reset()
    added = mock.patch.dict(families.FAMILIES, own)
    with tempfile.TemporaryDirectory() as folder, added:
        try:
            report = train.train(dataclasses.replace(cfg, out_dir=folder), quiet=True)
        except UserError as error:
            if "not finite" not in str(error):
                raise
            return None
        report |= look(os.path.join(folder, "models", f"{cfg.name}.best.pt"))
        with open(os.path.join(folder, "logs", f"{cfg.name}.jsonl"), encoding="utf-8") as log:
            return report, [json.loads(line) for line in log]


class Kept(NamedTuple):
    """A training run and the network that it ends with."""

    report: dict
    model: torch.nn.Module
    tokenizer: object
    cfg: Config
    hardware: ranks.Hardware


def run_and_keep(device, own=variants.OWN_FAMILIES):
    """Function from a Config to the `Kept` of its training run, where settings that follow each
    other are of one run: it is trained once."""

    @functools.lru_cache(maxsize=1)
    def run(cfg):
        found = []

        def look(path):
            model, tokenizer, own_cfg = checkpoint.restore(checkpoint.read(path), device)
            dtype = runtime.dtype_of_run("auto", own_cfg.dtype, device, cfg.name)
            found.append((model, tokenizer, own_cfg, ranks.Hardware(device, dtype)))
            return {}

        report, _ = run_variant(cfg, look, own)
        return Kept(report, *found[0])

    return run


def train_variants(comparison, options):
    """(function from a setting to the figures of its training run; what they depend on besides)."""

    def measure(setting):
        cfg = variant_config(comparison, options, setting["variant"], setting["seed"])
        found = run_variant(cfg)
        if found is None:
            nothing = {"above_exact": None, "masked_ce": None, "curve": ""}
            return dict.fromkeys(FIGURES, math.nan) | nothing
        report, entries = found
        # minutes of training steps alone, without starting, compiling and evaluating
        minutes = lambda steps: steps * report["seconds_a_step"] / 60
        return {
            "bound": report["bound_nats_per_token"],
            "bits_per_character": report["bound_bits_per_character"],
            "bits_per_byte": report["bound_bits_per_byte"],
            "se_rows": report["bound_se_rows"],
            "se_masks": report["bound_se_masks"],
            "last_bound": entries[-1]["bound"],
            "loss": entries[-1]["loss"],
            "steps": report["steps"],
            "minutes": minutes(report["steps"]),
            "ms_a_step": 1000 * report["seconds_a_step"],
            "rows_a_step": cfg.batch_size,
            "parameters": report["parameters"],
            "above_exact": report.get("excess_over_exact"),
            "masked_ce": report.get("masked_ce_pooled"),
            "curve": " ".join(
                f"{e['step']}:{minutes(e['step']):.4g}:{e['bound']:.4f}:{e['loss']:.4f}"
                for e in entries
            ),
        }

    configs = [
        cli.merge(Config, variants.base_config(options), changes)
        for changes in variants.TRAINED[comparison](options).values()
    ]
    cfg = configs[0]
    what = {
        TABLES.get(name, name): getattr(cfg, name)
        for name in ("data", "n_layer", "n_embd", "seq_len")
        if len({getattr(variant, name) for variant in configs}) == 1
    }
    return measure, what | {"device": runtime.choose_device(cfg.device).type}


FIGURES = (
    "bound",
    "bits_per_character",
    "bits_per_byte",
    "se_rows",
    "se_masks",
    "last_bound",
    "loss",
    "steps",
    "minutes",
    "ms_a_step",
    "rows_a_step",
    "parameters",
    "above_exact",
    "masked_ce",
)


def over_seeds(rows):
    """One row for each variant: means over its seeds, and the standard error of the bound over
    them."""
    groups = {}
    for row in rows:
        key = {name: row[name] for name in row if name not in (*FIGURES, "seed", "curve")}
        groups.setdefault(tuple(key.items()), []).append(row)
    out = []
    for key, runs in groups.items():
        mean = lambda name: (
            statistics.fmean(float(run[name]) for run in runs)
            if all(run.get(name) for run in runs)
            else None
        )
        bounds = [float(run["bound"]) for run in runs]
        several = len(runs) > 1 and not any(map(math.isnan, bounds))
        spread = statistics.stdev(bounds) / len(runs) ** 0.5 if several else None
        key = {name: value for name, value in key if name not in ("config", "device", "dtype")}
        out.append(
            key
            | {"seeds": len(runs), "steps": runs[0]["steps"]}
            | {
                name: rounded(value)
                for name, value in (
                    ("bound", mean("bound")),
                    ("se_seeds", spread),
                    ("se_rows", mean("se_rows")),
                    ("bits_per_character", mean("bits_per_character")),
                    ("bits_per_byte", mean("bits_per_byte")),
                    ("above_exact", mean("above_exact")),
                    ("last_bound", mean("last_bound")),
                    ("training_loss", mean("loss")),
                    ("masked_ce", mean("masked_ce")),
                    ("parameters", runs[0].get("parameters")),
                    ("ms_a_step", mean("ms_a_step")),
                    ("minutes", mean("minutes")),
                )
            }
        )
    return out
