"""How well the samplers of one network write stories that no grammar can judge: the comparison
`stories` of scripts/lab/ablate.py, which runs it."""

import time
from functools import partial

import torch

from config import SampleConfig
from scripts.lab.compare_samplers import generate, trained
from scripts.lab.stories import Checker
from utils import canvas, corpus, judges, metrics, samples, texts
from utils.cli import UserError

DEFAULT = dict(sampler="", steps="", decode_block=0, temperature=1.0, top_p=SampleConfig.top_p)


def story_settings(options):
    """Held-out text; samplers at 16 to 256 NFE; then the default at other temperatures and shares,
    and in blocks."""
    rows = [{"sampler": "held-out text"}, {"sampler": "first_hitting"}]
    rows += [
        {"sampler": name, "steps": steps}
        for name in ("random", "confidence")
        for steps in (16, 32, 64, 256)
    ]
    rows += [{"sampler": f"entropy_bounded:{bound:g}"} for bound in (0.03, 0.1, 0.3, 1.0, 3.0)]
    rows += [{"sampler": f"local_entropy:{size}"} for size in (8, 16, 32, 64)]
    rows += [
        {"sampler": "entropy_bounded:0.1", "temperature": t, "top_p": share}
        for t in (0.5, 0.7, 0.8, 0.9, 1.0)
        for share in (0.9, 0.95, 1.0)
    ]
    rows += [
        {"sampler": sampler, "decode_block": size}
        for sampler in ("entropy_bounded:0.1", "first_hitting")
        for size in (8, 16, 32, 64)
    ]
    return [DEFAULT | row for row in rows]


def judge_stories(options):
    """(function from a setting to what its samples are like; what that depends on besides).

    Beside `samples.diversity` and `Checker.figures`: the judge's NLL, the longest copy of training
    text, tokens of a story, seconds.
    """
    one = trained(options, blocks=True)
    tokenizer, cfg = one.tokenizer, one.family.cfg
    if not options.judge:
        raise UserError("stories needs a --judge: an autoregressive checkpoint, or hf:gpt2-large")
    judge = judges.load(options.judge, one.hardware.device)
    data = corpus.load(cfg, tokenizer)
    checker = Checker(corpus.parts(cfg, texts.read_documents(cfg.data))[0])
    training = data.training(one.step, metrics.SEARCHED)

    def measure(setting):
        start, nfe = time.perf_counter(), torch.zeros(1)
        if setting["sampler"] == "held-out text":
            rows = samples.reference_rows(data.held_out, tokenizer, one.count)
        else:
            rows, nfe = one.rows(partial(generate, one.model, one.family, setting))
        seconds = time.perf_counter() - start
        stories = [
            story for row in rows.tolist() for story in canvas.documents(tokenizer, row, cfg.rows)
        ]
        own = samples.without_filling(rows, tokenizer, cfg)
        return (
            {"nfe": nfe.float().mean().item(), "seconds_a_sample": seconds / one.count}
            | judges.score(stories, judge)
            | checker.figures(stories)
            | samples.diversity(stories)
            | {
                "longest_copy": samples.longest_copies(own, training).float().mean().item(),
                "tokens": (own >= 0).sum(1).float().mean().item(),
            }
        )

    return measure, one.common | {"judge": options.judge}
