"""What the order of unmasking is worth where every hole has one right filling: the comparison
`puzzles` of scripts/lab/ablate.py, which runs it."""

import math

from config import SampleConfig
from scripts.lab.compare_samplers import trained
from utils import samples
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


def judge_puzzles(options):
    """(function from a setting to the share of held-out puzzles that are solved, with its standard
    error, and NFE; what that depends on besides)."""
    one = trained(options)
    cfg = one.family.cfg
    puzzles = BUILT_IN[cfg.data].puzzles(one.count) if cfg.data in BUILT_IN else []
    if not puzzles:
        raise UserError(
            f"{cfg.name} was trained on {cfg.data}, which has no puzzles: python train.py sudoku"
        )

    def measure(setting):
        how = SampleConfig(**setting | {"steps": setting["steps"] or None})
        with one.hardware.autocast():
            found = samples.solve_puzzles(
                one.model, one.family, one.tokenizer, puzzles, one.hardware.device, how
            )
        share = found["puzzles_solved"]
        return {
            "nfe": found["nfe_a_puzzle"],
            "solved": share,
            "se": math.sqrt(share * (1 - share) / len(puzzles)),
        }

    return measure, one.common
