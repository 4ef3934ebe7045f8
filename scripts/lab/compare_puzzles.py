"""What the order of writing is worth where every hole has one right filling: the comparisons
`puzzles`, of samplers, and `puzzle_families`, of scripts/lab/ablate.py, which runs them."""

import functools
import math

from config import Config, SampleConfig
from scripts.lab import variants
from scripts.lab.compare_samplers import trained
from scripts.lab.compare_training import run_and_keep
from utils import cli, families, runtime, samples
from utils.built_in import BUILT_IN
from utils.cli import UserError

STEPS = (2, 4, 8, 16, "")  # "": a hole a step
NUMBERS = {"entropy_bounded": (0.01, 0.1, 0.3, 1.0), "local_entropy": (2, 4, 8, 16)}


def puzzle_settings(options):
    """A fixed number of holes a step, in several orders; samplers that choose it themselves; and
    those that mask again. The likeliest digit, and one that is drawn."""
    rows = []
    for name in ("random", "confidence", "entropy", "margin"):
        rows += [{"sampler": name, "steps": steps} for steps in STEPS]
    for name, numbers in NUMBERS.items():
        rows += [{"sampler": f"{name}:{number:g}", "steps": ""} for number in numbers]
    for name in ("remdm_conf", "remdm_cap"):
        rows += [{"sampler": name, "steps": steps} for steps in (16, 32, 64)]
    return [row | {"temperature": t, "top_p": 1.0} for t in (0.0, 1.0) for row in rows]


def difficulty_settings(options):
    """Puzzles of 6 x 6 with fewer and fewer clues; and those where a solver has to guess. Always
    the likeliest digit, a hole a step."""
    kinds = [(clues, 0) for clues in (20, 15, 12, 10, 9, 8)] + [(10, 1), (9, 1)]
    return [
        {"clues": clues, "guesses": guesses, "sampler": sampler, "temperature": 0.0}
        for clues, guesses in kinds
        for sampler in ("random", "entropy")
    ]


def judge_puzzles(options):
    """(function from a setting to the share of held-out puzzles that are solved, with its standard
    error, and NFE; what that depends on besides)."""
    one = trained(options)
    cfg = one.family.cfg
    made = BUILT_IN.get(cfg.data)
    if not made or not made.puzzles(1):
        raise UserError(
            f"{cfg.name} was trained on {cfg.data}, which has no puzzles: python train.py sudoku"
        )

    @functools.lru_cache(maxsize=1)
    def puzzles(**kind):
        return made.puzzles(one.count, **kind)

    def measure(setting):
        kind = {name: setting[name] for name in ("clues", "guesses") if name in setting}
        how = {name: value or None for name, value in setting.items() if name == "steps"}
        how = SampleConfig(**{k: v for k, v in setting.items() if k not in kind} | how)
        return solved(one.model, one.family, one.tokenizer, puzzles(**kind), one.hardware, how)

    return measure, one.common


def solved(model, family, tokenizer, puzzles, hardware, how):
    """Figures (dict) of the puzzles that a model solves."""
    with hardware.autocast():
        found = samples.solve_puzzles(model, family, tokenizer, puzzles, hardware.device, how)
    share = found["puzzles_solved"]
    return {
        "nfe": found["nfe_a_puzzle"],
        "solved": share,
        "se": math.sqrt(share * (1 - share) / len(puzzles)),
    }


# --- families -------------------------------------------------------------------------------------

MASKED = ("random", "confidence", "entropy", "margin", "entropy_bounded", "remdm_conf")


def variant_of(options, name):
    """The Config of a variant of `variants.puzzles`."""
    base = variants.base_config(options) | {"save_interval": 10**9}
    return cli.merge(Config, base, variants.puzzles(options)[name])


def family_settings(options):
    """Every family that fills holes, or answers; by each of its samplers, where it has several.
    Always the likeliest digit."""
    rows = []
    for name in variants.puzzles(options):
        family = families.family_of(variant_of(options, name))
        if family.exact:
            orders = (family.procedure,)
        elif family.block_len:
            orders = ("confidence", "entropy_bounded")
        elif family.carries_over:
            orders = MASKED
        else:
            says_rho = family.cfg.loss_weighting == "full"
            orders = ("reverse", "entropy_bounded" if says_rho else "reverse, 2 correctors")
        rows += [
            {"variant": name, "seed": seed, "sampler": order}
            for seed in range(1, options.seeds + 1)
            for order in orders
        ]
    return rows


def judge_families(options):
    """(function from a setting to the figures of its training run and the share of puzzles that it
    solves; what they depend on besides). A run serves the settings of a variant and a seed that
    follow each other."""
    device = runtime.choose_device(options.device)
    first, run = variant_of(options, next(iter(variants.puzzles(options)))), run_and_keep(device)
    if not BUILT_IN.get(first.data) or not BUILT_IN[first.data].puzzles(1):
        raise UserError("puzzle_families trains on grids; give --base sudoku")

    def measure(setting):
        cfg = vars(variant_of(options, setting["variant"]))
        report, model, tokenizer, cfg, hardware = run(
            cli.merge(Config, cfg, {"seed": setting["seed"]})
        )
        family, noun = families.family_of(cfg), BUILT_IN[cfg.data].noun
        figures = {
            "steps": report["steps"],
            "minutes": report["minutes"],
            "parameters": report["parameters"],
            "bound": report[f"bound_nats_per_{noun}"],
            "exact": report[f"exact_nats_per_{noun}"],
        }
        name, _, correctors = setting["sampler"].partition(", ")
        fixed = name in family.samplers
        how = SampleConfig(
            sampler=name if fixed else "",
            steps=64 if name == "remdm_conf" else None,
            temperature=0.0,
            top_p=1.0,
            correctors=2 if correctors else 0,
        )
        if family.exact and family.cfg.rows != "pair":  # which fills no holes
            return figures | {"nfe": None, "solved": None, "se": None}
        puzzles = BUILT_IN[family.cfg.data].puzzles(options.num_samples)
        return figures | solved(model, family, tokenizer, puzzles, hardware, how)

    what = {"minutes_a_run": options.minutes, "puzzles": options.num_samples}
    return measure, what | {"device": device.type, "n_layer": first.n_layer, "n_embd": first.n_embd}
