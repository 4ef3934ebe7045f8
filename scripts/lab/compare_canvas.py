"""The recipe of DiffusionGemma in small, and each of its ingredients on trial: the comparison
`canvas` of scripts/lab/ablate.py, which runs it.

All variants have the base's shape and as many minutes. What their samples are worth is judged on
tales, over the NFE that they take; and what of the wrong words in a story they repair.
"""

import random

import torch

import diffusion
from config import Config, SampleConfig
from scripts.lab import variants
from scripts.lab.compare_samplers import generate
from scripts.lab.compare_training import run_and_keep
from utils import canvas, cli, families, repair, runtime, samples, tales
from utils.built_in import BUILT_IN
from utils.cli import UserError

STEPS = (4, 8, 12, 16, 24, 32, 64)
MASKED = [f"entropy_bounded:{x:g}" for x in (0.03, 0.1, 0.3, 1, 3)]
LOCAL = [f"local_entropy:{x}" for x in (11, 17, 22, 33, 48)]
RENOISING = ("entropy_bounded:0.1", "entropy_bounded:1")
WRONG = (1, 2, 4, 8)  # words of a story


def config_of(options, name):
    """The Config of a variant of `variants.canvas`."""
    base = variants.base_config(options) | {"save_interval": 10**9}
    return cli.merge(Config, base, variants.canvas(options)[name])


def canvas_settings(options):
    """Every variant: by the samplers of its family, at several NFE; and repair."""
    rows = []
    for name in variants.canvas(options):
        family = families.family_of(config_of(options, name))
        if family.carries_over:
            ways = [
                (sampler, "", "") for sampler in MASKED + (LOCAL if not family.block_len else [])
            ]
        else:
            ways = [("reverse", steps, "") for steps in STEPS]
            ways += [(sampler, steps, 0.4) for sampler in RENOISING for steps in STEPS]
        ways += [(f"repair {k}", "", "") for k in WRONG if not family.block_len]
        rows += [
            {"variant": name, "seed": seed, "sampler": sampler, "steps": steps, "cooled": last}
            for seed in range(1, options.seeds + 1)
            for sampler, steps, last in ways
        ]
    return rows


def judge_canvas(options):
    """(function from a setting to the figures of its run and of its samples, or to the share of
    stories that it repairs; what they depend on besides)."""
    run = run_and_keep(runtime.choose_device(options.device))
    first = config_of(options, next(iter(variants.canvas(options))))
    if first.data != "tales":
        raise UserError("canvas is judged on tales; give --base tales")

    def measure(setting):
        cfg = vars(config_of(options, setting["variant"])) | {"seed": setting["seed"]}
        kept = run(cli.merge(Config, cfg))
        report, family = kept.report, families.family_of(kept.cfg)
        figures = {
            "training_steps": report["steps"],
            "parameters": report["parameters"],
            "above_exact": report["excess_over_exact"],
        }
        with kept.hardware.autocast():
            if setting["sampler"].startswith("repair"):
                wrong = int(setting["sampler"].removeprefix("repair "))
                return figures | repaired(kept, family, wrong, options.num_samples)
            return figures | sampled(kept, family, setting, options.num_samples)

    return measure, {"minutes_a_run": options.minutes, "samples": options.num_samples}


def sampled(kept, family, setting, count):
    """NFE and what is known of `count` samples (dict); where the temperature falls, from 0.8."""
    last = setting["cooled"] or None
    how = {"sampler": setting["sampler"], "steps": setting["steps"], "final_temperature": last}
    how["temperature"] = 0.8 if last else 1.0
    write = lambda blank, seeds: generate(kept.model, family, how, blank, seeds)
    rest = (family, kept.tokenizer)
    rows, nfe = samples.sample_rows(
        write, *rest, samples.canvases(*rest, count), kept.hardware.device
    )
    stories = [canvas.finished(kept.tokenizer, row) for row in rows.tolist()]
    figures = BUILT_IN["tales"].figures(stories) | samples.diversity(stories)
    names = ("valid", "agreeing", "log_prob", "distinct", "distinct_2")
    return {"nfe": nfe.float().mean().item()} | {name: figures[name] for name in names}


def broken(story, count, rng):
    """The story (str) with `count` of its words replaced by others of the grammar."""
    words, vocabulary = story.split(" "), WORDS
    for place in rng.sample(range(len(words)), count):
        bare = words[place].strip('.,"!')
        other = rng.choice([word for word in vocabulary if word != bare])
        words[place] = words[place].replace(bare, other, 1)
    return " ".join(words)


# words of the grammar, each once
WORDS = sorted({w.strip('.,"!') for s in tales.generate("words", 200) for w in s.split(" ")} - {""})


def repaired(kept, family, count, number):
    """Share (dict) of `number` held-out stories with `count` wrong words that become valid, and
    that become what they were."""
    tokenizer, cfg, rng = kept.tokenizer, kept.cfg, random.Random(f"wrong {count}")
    truth = BUILT_IN["tales"].held_out(cfg.seed)[:number]
    found, nfe = [], 0
    for seed, story in enumerate(truth):
        how = SampleConfig(draft=broken(story, count, rng), draft_noise=count / cfg.seq_len)
        try:
            row = canvas.drafted(how, cfg, tokenizer)
        except UserError:  # a rare word has more tokens than the window has room for
            found.append("")
            continue
        draft = torch.tensor([row], device=kept.hardware.device)
        blank = draft.masked_fill(torch.arange(len(row), device=draft.device) > 0, tokenizer.mask)
        blank, draft = repair.begin(family, kept.model, blank, draft, how.draft_noise)
        for step in diffusion.sample(family, kept.model, blank, how, seeds=[seed], draft=draft):
            pass
        found.append(canvas.finished(tokenizer, step.ids[0].tolist()))
        nfe += step.nfe + (len(row) - 1 if draft is None else 0)  # each token is asked for, masked
    valid = sum(tales.log_prob(text) > -float("inf") for text in found)
    same = sum(map(str.__eq__, found, truth))
    return {"nfe": nfe / number, "valid": valid / number, "restored": same / number}
