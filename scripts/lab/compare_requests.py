"""What classifier-free guidance buys where a story was asked for: the comparison `guidance` of
scripts/lab/ablate.py, which runs it."""

import math
from functools import partial

from scripts.lab.compare_samplers import generate, trained
from utils import pairs
from utils.built_in import BUILT_IN
from utils.cli import UserError

GUIDANCE = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)


def guidance_settings(options):
    """At temperature 1, where all that is sampled is the model's own; and with its usual top-p."""
    return [
        {"sampler": "entropy_bounded", "guidance": w, "top_p": p, "steps": ""}
        for p in (1.0, 0.98)
        for w in GUIDANCE
    ]


def judge_requests(options):
    """(function from a setting to figures of the answers to held-out requests; what they depend on
    besides)."""
    one = trained(options)
    made = BUILT_IN.get(one.family.cfg.data)
    if made is not BUILT_IN["tales_asked"]:
        raise UserError("guidance is judged on stories on request: python train.py tales_asked")

    def measure(setting):
        rows, nfe = one.rows(partial(generate, one.model, one.family, setting))
        figures = made.figures(pairs.of_rows(rows, one.tokenizer))
        error = lambda share: math.sqrt(share * (1 - share) / one.count)
        return {
            "nfe": nfe.float().mean().item(),
            "valid": figures["valid"],
            "obeying": figures["obeying"],
            "se": error(figures["obeying"]),
            "distinct": figures["distinct"],
            "log_prob": figures["log_prob"],
        }

    return measure, one.common
