"""The recipe of DiffusionGemma in small, and each of its ingredients on trial: the comparison
`canvas` of scripts/lab/ablate.py, which runs it.

All variants have the base's shape and as many minutes. What their samples are worth is judged over
the NFE that they take: on tales and on grids exactly, on other texts by their words. Besides: what
of the wrong words in a tale they repair, and how many puzzles they solve.
"""

import functools
import math
import operator
import random
import re
import statistics

import torch

import diffusion
from config import Config, SampleConfig
from scripts.lab import variants
from scripts.lab.compare_samplers import generate
from scripts.lab.compare_training import run_and_keep
from scripts.lab.stories import WORD
from utils import canvas, cli, families, repair, runtime, samples, tales
from utils.built_in import BUILT_IN
from utils.cli import UserError

STEPS = (8, 12, 16, 24, 32, 64)
# "cooled": the temperature falls from 0.8 to 0.4; strict is DiffusionGemma's own rule
WAYS = (
    "reverse",
    "entropy_bounded:10",
    "entropy_bounded:10, cooled",
    "entropy_bounded:3, cooled",
    "entropy_bounded:1, cooled",
    "entropy_bounded_strict:0.1, cooled",
)
BOUNDS = (0.03, 0.1, 0.3, 1, 3)  # of masks, nats
STRETCHES = (11, 17, 22, 33, 48)  # of local_entropy
WRONG = (1, 2, 4, 8)  # words of a story
REPAIRING = ("reverse", "entropy_bounded:10")  # that repair and solve


def config_of(options, name):
    """The Config of a variant of `variants.canvas`; with many masks, since a bound of few is off by
    a percent: what counts is in rows with little noise, which are rare."""
    base = variants.base_config(options) | {"save_interval": 10**9, "final_masks": 16}
    return cli.merge(Config, base, variants.canvas(options)[name])


def ways(family):
    """(sampler, steps) of all that a family's samples are made with; "" is no number of steps."""
    if not family.carries_over:
        return [(name, steps) for name in WAYS for steps in STEPS]
    bounded = [
        f"entropy_bounded:{bound:g}{cooled}" for cooled in ("", ", cooled") for bound in BOUNDS
    ]
    local = [] if family.block_len else [f"local_entropy:{length}" for length in STRETCHES]
    return [(name, "") for name in bounded + local]


def canvas_settings(options):
    """Every variant: by the samplers of its family, at several NFE; and what else its corpus asks
    for."""
    rows = []
    for name in variants.canvas(options):
        cfg = config_of(options, name)
        family, found = families.family_of(cfg), []
        if cfg.data == "tales" and not family.carries_over:
            found = [(f"repair {k}, {how}", "") for how in REPAIRING for k in WRONG]
        elif cfg.data == "tales" and not family.block_len:
            found = [(f"repair {k}", "") for k in WRONG]
        elif cfg.data.startswith("sudoku") and not family.block_len:
            fill = ("entropy", "entropy_bounded") if family.carries_over else REPAIRING
            found = [(f"puzzles, {how}", "") for how in fill]
        rows += [
            {"variant": name, "seed": seed, "sampler": sampler, "steps": steps}
            for seed in range(1, options.seeds + 1)
            for sampler, steps in ways(family) + found
        ]
    return rows


def judge_canvas(options):
    """(function from a setting to the figures of its run, and to those of its samples, repairs or
    puzzles; what they depend on besides)."""
    run = run_and_keep(runtime.choose_device(options.device))
    base = config_of(options, "masked")
    if base.rows == "pair" or base.data not in BUILT_IN and not base.data.endswith(".txt"):
        raise UserError("canvas is of texts: a built-in corpus of them, or a .txt file")

    def measure(setting):
        cfg = vars(config_of(options, setting["variant"])) | {"seed": setting["seed"]}
        kept = run(cli.merge(Config, cfg))
        report, bound = kept.report, kept.report["bound_nats_per_token"]
        above = report.get("excess_over_exact")
        figures = {
            "training_steps": report["steps"],
            "parameters": report["parameters"],
            "bound" if above is None else "above_exact": bound if above is None else above,
            "se_masks": report["bound_se_masks"] / bound,
        }
        name = re.match("repair|puzzles|", setting["sampler"])[0]
        job = {"repair": repaired, "puzzles": solved, "": sampled}[name]
        with kept.hardware.autocast():
            return figures | job(kept, families.family_of(kept.cfg), setting, options.num_samples)

    return measure, {"minutes_a_run": options.minutes, "samples": options.num_samples}


def sampling_of(name, steps=""):
    """The SampleConfig (dict) of a sampler as the table names it."""
    sampler, _, cooled = name.partition(", ")
    how = {"sampler": sampler, "steps": steps or None}
    return how | ({"temperature": 0.8, "final_temperature": 0.4} if cooled else {})


def sampled(kept, family, setting, count):
    """NFE and what is known of `count` samples (dict); of other texts than built-in ones the share
    of their words that the corpus has."""
    how = sampling_of(setting["sampler"], setting["steps"])
    write = lambda blank, seeds: generate(kept.model, family, how, blank, seeds)
    rest = (family, kept.tokenizer)
    rows, nfe = samples.sample_rows(
        write, *rest, samples.canvases(*rest, count), kept.hardware.device
    )
    whole = kept.cfg.rows == "document"
    found = [canvas.finished(kept.tokenizer, row, stop=whole) for row in rows.tolist()]
    figures = {"nfe": nfe.float().mean().item()} | samples.diversity(found)
    if made := BUILT_IN.get(kept.cfg.data):
        figures |= made.figures(found)
    else:
        # windows cut the first and the last word
        words = [word for text in found for word in WORD.findall(text)[1:-1]]
        known = sum(map(words_of(kept.cfg.data).__contains__, words))
        figures["words"] = known / max(1, len(words))
    names = ("nfe", "valid", "agreeing", "log_prob", "words", "distinct_2", "self_overlap")
    return {name: figures[name] for name in names if name in figures}


@functools.cache
def words_of(path):
    """The words (set of str) of a text file."""
    with open(path, encoding="utf-8") as file:
        return {word for line in file for word in WORD.findall(line)}


def solved(kept, family, setting, count):
    """NFE and the share (dict) of `count` puzzles that are solved, the likeliest digit always."""
    how = SampleConfig(sampler=setting["sampler"].partition(", ")[2], temperature=0.0, top_p=1.0)
    puzzles = BUILT_IN[kept.cfg.data].puzzles(count)
    rest = (family, kept.tokenizer, puzzles, kept.hardware.device, how)
    found = samples.solve_puzzles(kept.model, *rest)
    return {"nfe": found["nfe_a_puzzle"], "solved": found["puzzles_solved"]}


# words of the grammar, each once
WORDS = sorted({w.strip('.,"!') for s in tales.generate("words", 200) for w in s.split(" ")} - {""})


def broken(story, count, rng):
    """(the story (str) with `count` of its words replaced by others of the grammar, their
    places)"""
    words = story.split(" ")
    places = rng.sample(range(len(words)), count)
    for place in places:
        bare = words[place].strip('.,"!')
        words[place] = words[place].replace(
            bare, rng.choice([word for word in WORDS if word != bare]), 1
        )
    return " ".join(words), places


def drafts(kept, count, number):
    """(held-out stories, the places of their wrong words, rows (number, L) of what they became).
    A rare word may have more tokens than the window has room for: then others are wrong."""
    rng, truth = random.Random(f"wrong {count}"), BUILT_IN["tales"].held_out(kept.cfg.seed)[:number]
    rows, where = [], []
    for story in truth:
        row = []
        while not row or len(row) > kept.cfg.seq_len:
            text, places = broken(story, count, rng)
            ids = canvas.build(kept.tokenizer, [text], kept.cfg.seq_len)
            row = ids + [kept.tokenizer.end] * max(1, kept.cfg.seq_len - len(ids))
        rows.append(row)
        where.append(places)
    return truth, where, torch.tensor(rows, device=kept.hardware.device)


def repaired(kept, family, setting, number):
    """NFE, and what becomes of `number` held-out stories with wrong words (dict); the sampler is
    told which share of the tokens is wrong."""
    count, _, sampler = setting["sampler"].removeprefix("repair ").partition(", ")
    steps, noise = None if family.carries_over else 24, int(count) / kept.cfg.seq_len
    how = SampleConfig(sampler=sampler, steps=steps, draft_noise=noise)
    truth, places, rows = drafts(kept, int(count), number)
    blank = rows.masked_fill(
        torch.arange(rows.size(1), device=rows.device) > 0, kept.tokenizer.mask
    )
    blank, draft, first = repair.begin(family, kept.model, blank, rows, how)
    for step in diffusion.sample(family, kept.model, blank, how, draft=draft):
        pass
    found = [canvas.finished(kept.tokenizer, row) for row in step.ids.tolist()]
    spent = first.row_nfe if first else 0
    return {"nfe": (step.row_nfe + spent).float().mean().item()} | judged(found, truth, places)


def judged(found, truth, places):
    """Shares (dict) of the texts found (list of str) that are valid stories; that are so with all
    words but those at the places as in truth; and that are what they were."""
    valid = [tales.log_prob(text) > -math.inf for text in found]
    others = lambda text, wrong: [w for i, w in enumerate(text.split(" ")) if i not in wrong]
    mended = [
        others(text, wrong) == others(story, wrong)
        for text, story, wrong in zip(found, truth, places)
    ]
    return {
        "valid": statistics.fmean(valid),
        "repaired": statistics.fmean(map(operator.and_, valid, mended)),
        "restored": statistics.fmean(map(operator.eq, found, truth)),
    }
