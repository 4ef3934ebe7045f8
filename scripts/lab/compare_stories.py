"""How well the samplers of one network write stories that no grammar can judge: the comparisons
`stories`, `block_lengths` and `long_stories` of scripts/lab/ablate.py, which runs them."""

import math
import time
from functools import partial

import torch

from config import SampleConfig
from scripts.lab.compare_samplers import generate, model_of, trained
from scripts.lab.stories import Checker, error_rates
from utils import canvas, corpus, families, judges, metrics, samples, texts
from utils.built_in import BUILT_IN
from utils.cli import UserError
from utils.policies import USUAL

DEFAULT = dict(sampler="", steps="", decode_block=0, temperature=1.0, top_p=SampleConfig.top_p)
REAL = dict.fromkeys(DEFAULT, "") | {"sampler": "held-out text"}  # which nothing samples
BROKEN = REAL | {"sampler": "held-out text, broken"}  # as `stories.error_rates` does


def family_of(options):
    """The family of the checkpoint that is meant."""
    *_, cfg, _ = model_of(options.checkpoint, torch.device("cpu"))
    return families.family_of(cfg)


def story_settings(options):
    """Held-out text, and the same broken; one token at a time; where the order is a choice,
    samplers at 16 to 256 NFE, in blocks at one for each or more; and the default at other
    temperatures and shares, and in blocks."""
    family = family_of(options)
    least = family.cfg.seq_len // family.block_len if family.block_len else 1  # NFE
    rows, best = [REAL, BROKEN, {"sampler": "first_hitting"}], "entropy_bounded:0.1"
    if family.procedure:  # it writes from left to right, whatever the sampler
        best = "first_hitting"
    else:
        rows += [
            {"sampler": name, "steps": steps}
            for name in ("random", "confidence")
            for steps in (16, 32, 63, 64, 128, 256)  # 63: one for each block of 4, with a prompt
            if steps >= least - 1
        ]
        rows += [{"sampler": f"entropy_bounded:{bound:g}"} for bound in (0.03, 0.1, 0.3, 1.0, 3.0)]
    if not family.procedure and not family.block_len:
        rows += [{"sampler": f"local_entropy:{size}"} for size in (8, 16, 32, 64)]
    rows += [
        {"sampler": best, "temperature": t, "top_p": share}
        for t in (0.5, 0.7, 0.8, 0.9, 1.0)
        for share in (0.9, 0.95, 1.0)
    ]
    if not family.block_len:
        rows += [
            {"sampler": sampler, "decode_block": size}
            for sampler in (best, "first_hitting")
            for size in (8, 16, 32, 64)
        ]
    return [DEFAULT | row for row in rows]


def check_choice(family):
    """Refuse what generates otherwise than by unmasking: the comparisons' settings are of that."""
    if not family.carries_over:
        raise UserError(
            "stories are compared of masked models, of blocks and of autoregressive ones, and "
            f"this is {family.name}"
        )


def prepared(options, name):
    """(`Trained`, its judge, its corpus, the checker of stories, the held-out stories) of what the
    comparison `name` measures."""
    one = trained(options, check_choice)
    if not options.judge:
        raise UserError(f"{name} needs a --judge: an autoregressive checkpoint, or hf:gpt2-large")
    judge = judges.load(options.judge, one.hardware.device)
    cfg = one.family.cfg
    if cfg.data in BUILT_IN or one.tokenizer.end is None:
        raise UserError(
            f"{name} judges stories of a file, and {cfg.name} was trained on {cfg.data}"
        )
    data = corpus.load(cfg, one.tokenizer)
    train, held_out = corpus.parts(cfg, texts.read_documents(cfg.data))
    return one, judge, data, Checker(train), held_out


def judge_stories(options):
    """(function from a setting to what its samples are like; what that depends on besides).

    Judged is the story that each sample begins with, to the window's end if it does not end before:
    beside `samples.diversity` and `Checker.figures` the judge's NLL, the longest copy of training
    text, tokens of a story, seconds of a sample in a batch. Of held-out stories that were broken,
    how many the checker does not see.
    """
    one, judge, data, checker, held_out = prepared(options, "stories")
    tokenizer, training = one.tokenizer, data.training(one.step, metrics.SEARCHED)

    def measure(setting):
        if setting == BROKEN:
            rates = error_rates(checker, held_out)
            return {
                "names_stay": rates["names_stay_in_halves_of_two"],
                "pronouns_agree": rates["pronouns_agree_swapped"],
            }
        start, nfe = time.perf_counter(), torch.zeros(1)
        if setting == REAL:
            rows = samples.reference_rows(data.held_out, tokenizer, one.count).clone()
        else:
            rows, nfe = one.rows(partial(generate, one.model, one.family, setting))
        seconds = time.perf_counter() - start
        stories = [canvas.finished(tokenizer, row) for row in rows.tolist()]
        for row in rows:  # what follows the story is not judged
            row[canvas.end(tokenizer, row.tolist()) + 1 :] = -1
        return (
            {"nfe": nfe.float().mean().item(), "seconds_a_sample": seconds / one.count}
            | judges.score(stories, judge)
            | checker.figures(stories)
            | samples.diversity(stories)
            | {
                "longest_copy": samples.longest_copies(rows, training).float().mean().item(),
                "tokens": (rows >= 0).sum(1).float().mean().item(),
            }
        )

    return measure, one.common | {"judge": options.judge}


BLOCKS_USUAL = dict(temperature=0.9, top_p=0.95)  # as the weights that ship are sampled


def block_settings(options):
    """Held-out text, and samplers at some 16 to 256 NFE: for models that differ in the length of
    their blocks."""
    family, rows = family_of(options), []
    least = family.cfg.seq_len // family.block_len if family.block_len else 1  # NFE
    for name in ("random", "confidence"):
        # the step for what a row of blocks is given is its own
        steps = (number - bool(family.block_len) for number in (16, 32, 64, 128))
        rows += [{"sampler": name, "steps": number} for number in steps if number >= least - 1]
    rows += [{"sampler": f"entropy_bounded:{bound:g}"} for bound in (0.1, 1.0, 3.0)]
    if not family.block_len:
        rows += [{"sampler": f"local_entropy:{size}"} for size in (16, 32, 64)]
    return [DEFAULT | REAL] + [DEFAULT | BLOCKS_USUAL | row for row in rows]


def judge_blocks(options):
    """`judge_stories`, and the block length with its figures."""
    measure, common = judge_stories(options)
    family = family_of(options)
    return measure, common | {"block_len": family.block_len or family.cfg.seq_len}


LONG, PARTS = 1000, 4  # tokens, and equal parts with figures of their own


def long_settings(options):
    """Held-out stories one after the other; the default sampler in blocks of several sizes, or the
    model's own; one token at a time; colder."""
    family, rows = family_of(options), [REAL]
    sizes, best = (0,) if family.block_len else (8, 16, 32, 64), USUAL
    if family.procedure:
        best = "first_hitting"
    else:
        rows += [{"sampler": "first_hitting", "decode_block": sizes[len(sizes) // 2]}]
    rows += [{"sampler": best, "decode_block": size} for size in sizes]
    rows += [{"sampler": best, "decode_block": sizes[len(sizes) // 2], "temperature": 0.8}]
    return [DEFAULT | row for row in rows]


def mean_of(values):
    """Mean of those that are not None."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else math.nan


def long_reference(held_out, tokenizer, count):
    """Ids (list of lists, LONG each, at most `count`) of held-out stories one after the other, with
    a blank line between; each begins where a story does. held_out (R, L) are the corpus's rows."""
    [blank], stories = tokenizer.encode(["\n\n"]), [[]]
    for i in held_out.flatten().tolist():
        if i != tokenizer.end:
            stories[-1].append(i)
        elif stories[-1]:
            stories.append([])
    found, row = [], []
    for story in stories[1:]:  # the first may have begun before
        row += blank + story if row else story
        if len(row) >= LONG:
            found, row = [*found, row[:LONG]], []
    return found[:count]


def judge_long(options):
    """(function from a setting to what becomes of texts of LONG tokens, in which nothing may end;
    what that depends on besides). A figure for each of PARTS equal parts: the judge's NLL, nats a
    token of the judge, with half a window of what stands before as its context, or more; words
    that end repeated four, whether the first name is still named, names that are new. The held-out
    text is of several stories, so its names are no yardstick."""
    one, judge, data, checker, _ = prepared(options, "long_stories")
    cfg, tokenizer = one.family.cfg, one.tokenizer

    def measure(setting):
        nfe = torch.zeros(1)
        if setting == REAL:
            written = long_reference(data.held_out, tokenizer, one.count)
        else:
            least = setting | {"min_len": LONG}
            more = dict(window=cfg.seq_len, stop=tokenizer.end)
            write = partial(generate, one.model, one.family, least, **more)
            written, nfe = one.rows(write, LONG + 1)
            written = written[:, 1:].tolist()
        found = [tokenizer.decode(row) for row in written]
        if not found:
            raise UserError(f"{cfg.data}: its held-out part has no {LONG:,} tokens")
        along = [checker.along(text, PARTS) for text in found]
        nll = [judges.token_nll(ids, judge).tensor_split(PARTS) for ids in judge.encode(found)]
        figures = {"nfe": nfe.float().mean().item()}
        for number in range(PARTS):
            mean = lambda name: mean_of(parts[number][name] for parts in along)
            figures |= {
                f"judge_{number + 1}": torch.cat([parts[number] for parts in nll]).mean().item(),
                f"repeated_{number + 1}": mean("repeated"),
                f"first_name_{number + 1}": mean("first_name"),
                f"new_names_{number + 1}": mean("new_names"),
            }
        return figures

    return measure, one.common | {"judge": options.judge}
