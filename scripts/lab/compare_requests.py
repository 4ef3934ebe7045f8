"""What classifier-free guidance buys where a story was asked for: the comparison `guidance` of
scripts/lab/ablate.py, which runs it."""

import math
from functools import cache, partial

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


class Blind:
    """The network as guidance asks it besides: with MASK at the positions `where` (B, L) bool."""

    def __init__(self, network, where):
        self.network, self.where, self.vocab_size = network, where, network.vocab_size

    def __call__(self, ids, *args, **more):
        return self.network(ids.masked_fill(self.where, self.vocab_size - 1), *args, **more)


JUDGED = 64  # held-out answers


def bounds(one, made):
    """Nats of an answer by the bound, where the request is seen, and where it is masked."""
    cfg, tokenizer = one.family.cfg, one.tokenizer
    rows, _ = pairs.rows_of(made.held_out(cfg.seed)[:JUDGED], tokenizer, cfg.seq_len)
    given = pairs.given(rows, tokenizer)
    blind = given.clone()
    blind[:, : one.family.bos] = False
    with one.hardware.autocast():
        for network in (one.model, Blind(one.model, blind)):
            yield one.family.nelbo(network, rows, 4, given).mean().item() * cfg.seq_len


def judge_requests(options):
    """(function from a setting to figures of the answers to held-out requests; what they depend on
    besides)."""
    one = trained(options)
    made = BUILT_IN.get(one.family.cfg.data)
    if made is not BUILT_IN["tales_asked"]:
        raise UserError("guidance is judged on stories on request: python train.py tales_asked")

    found_bounds = cache(lambda: tuple(bounds(one, made)))

    def measure(setting):
        seen, masked = found_bounds()
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
            "bound": seen,
            "bound_without_request": masked,
        }

    return measure, one.common
