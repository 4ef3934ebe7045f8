"""What stands behind the end of an answer while a model of pairs is trained: the comparison
`padding` of scripts/lab/ablate.py, which runs it.

The corpus is made for it: a question that says nothing, and of a story of the grammar the first 1
to 5 sentences, all numbers alike. So a model has to find by itself where an answer ends, and how
often it should end after how many sentences is known.
"""

import dataclasses
import os
import tempfile
from collections import Counter

import diffusion
from config import Config, SampleConfig
from scripts.lab import variants
from scripts.lab.compare_training import run_and_keep
from utils import cli, encoding, families, metrics, pairs, runtime, samples, tales

PAIRS, SENTENCES, QUESTION = 20_000, 5, "Begin a story."


def beginning(seed, story):
    """The first sentences of a story, a number from its text."""
    draw = int(runtime.generator(seed, story).initial_seed())
    return " ".join(tales.SENTENCE_END.split(story)[: 1 + draw % SENTENCES])


def behind(x0):
    """What stands behind the first `<|endoftext|>` of an answer in rows x0 (B, L): (B, L) bool. One
    stands in front of the row; a BPE that is trained here has the id 0 for it."""
    return ((x0 == 0).cumsum(1) > 2) & (x0 == 0)


class Visible(diffusion.Masked):
    """What is behind the end is never masked, and carries no loss."""

    def loss(self, model, x0, corruption, token_nll=diffusion.token_nll):
        corruption = corruption.to(x0.device)
        masked = self.masked(corruption.masked, behind(x0))
        silent = behind(x0).flatten()[corruption.index.clamp(min=0)]
        index = corruption.index.masked_fill(silent, -1)
        return super().loss(model, x0, corruption._replace(masked=masked, index=index), token_nll)

    def masked(self, masked, behind):
        return masked & ~behind


class Hidden(Visible):
    """What is behind the end is always masked, and carries no loss."""

    def masked(self, masked, behind):
        return masked | behind


OBJECTIVES = {"visible": Visible, "hidden": Hidden}
BEHIND = {"masked like the answer": "masked", "visible": "visible", "all masks": "hidden"}
SAMPLERS = ("entropy_bounded", "confidence", "first_hitting")


def padding_settings(options):
    return [
        {"behind the end": name, "seed": seed, "sampler": sampler}
        for name in BEHIND
        for seed in range(1, options.seeds + 1)
        for sampler in SAMPLERS
    ]


def measure_padding(options):
    """(function from a setting to what is known of answers; what they depend on besides). A run
    serves the samplers that follow each other."""
    device, folder = runtime.choose_device(options.device), tempfile.TemporaryDirectory()
    path = os.path.join(folder.name, "beginnings.jsonl")
    stories = (beginning("padding", story) for story in tales.generate("padding", PAIRS))
    pairs.write(path, (pairs.asked(f"{QUESTION} {n}", text) for n, text in enumerate(stories)))
    run = run_and_keep(device, OBJECTIVES)

    def measure(setting, folder=folder):  # which lasts as long as this is held
        changes = {"data": path, "objective": BEHIND[setting["behind the end"]]}
        cfg = cli.merge(Config, variants.base_config(options), changes, {"seed": setting["seed"]})
        return judge(run(cfg), setting["sampler"], options.num_samples)

    return measure, {"minutes_a_run": options.minutes, "samples": options.num_samples}


def judge(trained, sampler, count):
    """Figures (dict) of `count` answers: the share that ends; of beginnings of a story, cut where
    they end; the total variation between the numbers of their sentences and equal ones."""
    cfg = dataclasses.replace(trained.cfg, objective="masked")
    family, tokenizer, model = families.family_of(cfg), trained.tokenizer, trained.model
    hardware = trained.hardware
    rows = encoding.held_out_rows(pairs.read(cfg.data)[:count], tokenizer, cfg)
    with hardware.autocast():
        bound = metrics.bound(model, family, tokenizer, rows, 8).mean().item()
        blanks = samples.canvases(family, tokenizer, count, rows)
        how = SampleConfig(sampler=sampler, top_p=1.0)
        found, figures = samples.generate_rows(
            model, family, tokenizer, blanks, hardware.device, how
        )
    answers = pairs.of_rows(found, tokenizer)
    ended = ((found == tokenizer.end) & ~pairs.given(found, tokenizer)).any(1)
    lengths = Counter(sentences(pair.completion) for pair in answers)
    uneven = sum(abs(lengths[n] / count - 1 / SENTENCES) for n in range(1, SENTENCES + 1))
    uneven += (count - sum(lengths[n] for n in range(1, SENTENCES + 1))) / count
    return {
        "steps": trained.report["steps"],
        "bound": bound,
        "ended": ended.float().mean().item(),
        "valid": sum(is_beginning(pair.completion) for pair in answers) / count,
        "total_variation": uneven / 2,
        "nfe": figures["nfe_a_sample"],
    }


def sentences(text):
    """How many a text has."""
    return len(tales.SENTENCE_END.split(text)) if text else 0


def is_beginning(text):
    """Whether a text is the first sentences of some story of the grammar."""
    found = (
        tales._derivations(text, plot[: sentences(text)], tales.TALES, {})
        for plot in tales.PLOTS.values()
    )
    return bool(text) and any(next(one, None) is not None for one in found)
