"""Samplers of one trained network, compared: the sampler comparisons of
scripts/lab/ablate.py, which runs them.

Each is a function from ablate.py's options to the settings, and one from them to (the function that
measures a setting, what its figures depend on besides).
"""

import re
import time
from functools import partial
from typing import NamedTuple

import torch

import diffusion
from config import SampleConfig
from scripts.lab import yardstick
from utils import (
    canvas,
    checkpoint,
    corpus,
    families,
    metrics,
    policies,
    ranks,
    runtime,
    samples,
    tales,
)
from utils import tokenizer as tokenizers
from utils.built_in import BUILT_IN
from utils.cli import UserError
from utils.policies import USUAL

# --- on tales, where truth is known ---------------------------------------------------------------

STEPS = (4, 8, 16, 32, 64)
MORE_STEPS = (*STEPS, 128, 256)  # for the samplers that gain from more steps than there are tokens
# samplers that choose their number of steps themselves
NUMBERS = {
    "threshold": (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
    "factor": (0.3, 0.5, 1.0, 1.5, 2.0, 3.0),
    "entropy_bounded": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    "local_entropy": (11, 17, 22, 33, 48),
}


def sampler_settings(options):
    """Every sampler over its own range of cost: steps, or its number; and what cutting off unlikely
    tokens does."""
    rows = []
    for name, sampler in policies.SAMPLERS.items():
        if name in NUMBERS:
            rows += [
                {"sampler": f"{name}:{number:g}", "steps": "", "decode_block": 0}
                for number in NUMBERS[name]
            ]
        elif sampler.one_a_step:
            rows.append({"sampler": name, "steps": "", "decode_block": 0})
        else:
            # "": one a token
            several = (
                MORE_STEPS if name == "ancestral" or name.startswith("remdm") else (*STEPS, "")
            )
            rows += [{"sampler": name, "steps": steps, "decode_block": 0} for steps in several]
    rows += [
        {"sampler": "confidence", "steps": steps, "decode_block": 16} for steps in (*STEPS, "")
    ]
    rows += [
        {"sampler": "source", "steps": steps, "decode_block": 0}
        for steps in (4, 8, 16, 32, 64, 101)
    ]
    rows = [row | {"cache": "none", "top_p": 1.0} for row in rows]
    best = {"sampler": USUAL, "steps": "", "decode_block": 0, "cache": "none"}
    rows += [best | {"top_p": share} for share in (0.9, 0.95, 0.98, 0.99)]
    best["decode_block"] = 16
    return rows + [
        best | {"cache": cache, "top_p": SampleConfig.top_p} for cache in ("none", "prefix", "dual")
    ]


def model_of(path, device):
    """(model, Tokenizer, Config, checkpoint dict) of the checkpoint at the path; "": the newest
    run's best."""
    path = path or checkpoint.newest()
    state = checkpoint.read(path)
    return *checkpoint.restore(state, device, path), state


def check_masked(family):
    """Refuse all but masked models of the whole window, whose sampler is a choice."""
    if family.block_len or family.procedure:
        raise UserError(
            f"{family.name} generates {family.procedure or 'block by block'}; samplers are "
            "compared with a masked model of the whole window"
        )


class Trained(NamedTuple):
    """The checkpoint whose samples are compared."""

    model: torch.nn.Module
    family: object
    tokenizer: tokenizers.Tokenizer
    step: int
    hardware: ranks.Hardware
    count: int  # samples of each setting
    common: dict  # what figures of it depend on, whatever the setting
    held_out: torch.Tensor = None  # rows of pairs, whose questions are answered

    def rows(self, generate, length=None):
        """`samples.sample_rows` of a function that generates."""
        rest = (self.family, self.tokenizer)
        blanks = samples.canvases(*rest, self.count, self.held_out, length)
        with self.hardware.autocast():
            return samples.sample_rows(generate, *rest, blanks, self.hardware.device)


def trained(options, check=check_masked):
    """The checkpoint that is meant, as `Trained`; check complains of its family."""
    device = runtime.choose_device(options.device)
    model, tokenizer, cfg, state = model_of(options.checkpoint, device)
    family = families.family_of(cfg)
    check(family)
    path = options.checkpoint or "the newest checkpoint"
    dtype = runtime.dtype_of_run(options.dtype, cfg.dtype, device, path)
    hardware = ranks.Hardware(device, dtype)
    common = {
        "num_samples": options.num_samples,
        "model": f"{cfg.name} {state['step']} {state['nll']:.4f}",
        "dtype": runtime.dtype_name(dtype),
    }
    held_out = corpus.load(cfg, tokenizer).held_out if cfg.rows == "pair" else None
    rest = (hardware, options.num_samples, common, held_out)
    return Trained(model, family, tokenizer, state["step"], *rest)


def generate(model, family, setting, blank, seeds, **more):
    """Ids and NFE of each row of blank (B, L) generated with the SampleConfig in setting (dict), or
    by the micro-dLLMs' procedure ("source"), or with a wrong clock ("notes, misled"); more: of
    `diffusion.sample`."""
    how = setting | {"steps": setting["steps"] or None}
    if how["sampler"] == "source":
        return yardstick.sampler(model, blank, how["steps"], seeds[0]), torch.full(
            (len(blank),), how["steps"]
        )
    if how["sampler"] == "notes, misled":
        model, how["sampler"] = misled(model, how["steps"]), "notes"
    steps = diffusion.sample(family, model, blank, SampleConfig(**how), seeds=seeds, **more)
    for last in steps:  # not a list: each step has tensors of its own
        pass
    return last.ids, last.row_nfe


def judge_samplers(options):
    """(function from a setting to its figures, with one tales model for all; what the figures
    depend on besides)."""
    one = trained(options)
    cfg = one.family.cfg
    if cfg.data != "tales":
        raise UserError(
            f"{cfg.name} was trained on {cfg.data}; samplers are judged on tales: python train.py "
            "tales"
        )

    def measure(setting):
        start = time.perf_counter()
        rows, nfe = one.rows(partial(generate, one.model, one.family, setting))
        seconds = time.perf_counter() - start
        stories = [
            story
            for row in rows.tolist()
            for story in canvas.documents(one.tokenizer, row, cfg.rows)
        ]
        figures = BUILT_IN["tales"].figures(stories) | samples.diversity(stories)
        return (
            {"nfe": nfe.float().mean().item()}
            | figures
            | {"entropy": tales.entropy(), "seconds_a_sample": seconds / one.count}
        )

    return measure, one.common


def temperature_settings(options):
    """The default sampler and one token at a time, from always the likeliest token to beyond the
    network's own."""
    return [
        {"sampler": sampler, "steps": "", "temperature": t, "top_p": 1.0}
        for sampler in (USUAL, "first_hitting")
        for t in (0.0, 0.3, 0.6, 0.8, 0.9, 1.0, 1.1, 1.3)
    ]


# --- who comes first ------------------------------------------------------------------------------


def order_settings(options):
    return [
        {"sampler": name, "steps": "", "temperature": t}
        for name, t in (
            ("first_hitting", 1.0),
            ("confidence", 1.0),
            ("confidence", 0.0),
            (USUAL, 1.0),
        )
    ]


def measure_order(options):
    """(function from a sampler to when each kind of character is unmasked; what it depends on
    besides).

    place         mean place in the order of unmasking, 0 (first) to 1, of the tokens that stand
                  for the most frequent quarter of the training text (frequent) and the least
                  frequent quarter (rare)
    early, all    share of frequent ones among the first tenth that is unmasked, and among all
    correlation   of a token's place with its frequency in the training text: negative where
                  frequent ones come first
    """
    one = trained(options)
    tokenizer, cfg = one.tokenizer, one.family.cfg
    training = corpus.load(cfg, tokenizer).training(one.step, metrics.SEARCHED)
    training = samples.without_filling(training, tokenizer, cfg)
    counts = torch.bincount(training[training >= 0].long(), minlength=tokenizer.mask).double()
    share = counts / counts.sum()
    cumulative = torch.zeros_like(share)
    order = share.argsort(descending=True)
    cumulative[order] = share[order].cumsum(0) - share[order] / 2  # 0: the most frequent

    def measure(setting):
        how = SampleConfig(
            sampler=setting["sampler"], temperature=setting["temperature"], top_p=1.0
        )

        def places(blank, seeds):
            place = torch.zeros(blank.shape, device=blank.device)
            steps = diffusion.sample(one.family, one.model, blank, how, seeds=seeds)
            for k, step in enumerate(steps, 1):
                place[step.fresh] = k
            last = place.amax(1, keepdim=True)  # a row that is finished early has had its last step
            return step.ids, torch.where(place > 0, (place - 1) / (last - 1).clamp(min=1), -1)

        ids, place = one.rows(places)
        unmasked = (place >= 0) & (samples.without_filling(ids, tokenizer, cfg) >= 0)
        rank = cumulative[ids[unmasked]]
        place = place[unmasked].double()
        frequency = share[ids[unmasked]]
        share_of_frequent = lambda some: (rank[some] < 0.25).double().mean().item()
        return {
            "early": share_of_frequent(place < 0.1),
            "all": share_of_frequent(place >= 0),
            "frequent": place[rank < 0.25].mean().item(),
            "middle": place[(rank >= 0.25) & (rank < 0.75)].mean().item(),
            "rare": place[rank >= 0.75].mean().item(),
            "correlation": torch.corrcoef(torch.stack((place, frequency)))[0, 1].item(),
        }

    return measure, one.common


# --- spelling -------------------------------------------------------------------------------------


def misled(model, steps):
    """`model`, told at each step what the notes' sampler tells it: their schedule's mask ratio at
    that time, though their sampler unmasks about as many tokens in each, so that another share is
    still masked."""
    times = iter(range(steps - 1, -1, -1))

    def network(ids, noise_level, **more):
        t = torch.tensor(next(times) / steps, device=ids.device)
        return model(ids, diffusion.mask_ratio("cos2_s008", t).expand(len(ids)), **more)

    network.vocab_size = model.vocab_size
    return network


def spelling_settings(options):
    """The notes' sampler with their 100 and 300 steps, with and without their clock, beside others
    with as many, the default, and other temperatures."""
    rows = [
        ("notes", 100),
        ("notes", 300),
        ("notes, misled", 100),
        ("notes, misled", 300),
        ("confidence", 100),
        ("random", 100),
        ("ancestral", 100),
        ("ancestral", 300),
        ("ancestral", 1000),
        ("remask", 100),
        ("source", 101),
        ("first_hitting", ""),
    ]
    best = [
        {"sampler": USUAL, "steps": "", "temperature": t, "top_p": 1.0}
        for t in (0.0, 0.5, 0.8, 1.0)
    ]
    return (
        [{"sampler": "held-out text", "steps": "", "temperature": 1.0, "top_p": 1.0}]
        + [
            {"sampler": name, "steps": steps, "temperature": 1.0, "top_p": 1.0}
            for name, steps in rows
        ]
        + best
        + [best[-1] | {"top_p": SampleConfig.top_p}]
    )


def measure_spelling(options):
    """(function from a setting to how its samples are spelled; what that depends on besides).

    words     share of the samples' words that the training text has
    speakers  share of their lines that end in a colon, and so name a speaker, that the training
              text has; None without such
    """
    one = trained(options)
    tokenizer, cfg = one.tokenizer, one.family.cfg
    if cfg.time_conditioning == "none":
        raise UserError(
            f"{cfg.name} is not told the time, so that a wrong clock would do nothing; train one "
            "that is: --time_conditioning sinusoidal"
        )
    data = corpus.load(cfg, tokenizer)
    words_of = lambda string: re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", string)
    speakers_of = lambda string: re.findall(r"\n(.+:)\n", string)
    training = tokenizer.decode(data.training(one.step, metrics.SEARCHED).flatten().tolist())
    share = lambda found, known: sum(one in known for one in found) / len(found) if found else None
    known_words, known_speakers = set(words_of(training)), set(speakers_of(training))

    def measure(setting):
        if setting["sampler"] == "held-out text":
            rows = samples.reference_rows(data.held_out, tokenizer, one.count)
            nfe = torch.zeros(1)
        else:
            rows, nfe = one.rows(partial(generate, one.model, one.family, setting))
        documents = cfg.rows == "document"
        texts = [canvas.finished(tokenizer, row, stop=documents) for row in rows.tolist()]
        # windows cut the first and the last word
        words = [word for text in texts for word in words_of(text)[1:-1]]
        speakers = [speaker for text in texts for speaker in speakers_of(text)]
        return {
            "nfe": nfe.float().mean().item(),
            "words": share(words, known_words),
            "speakers": share(speakers, known_speakers),
            "speaker_lines": len(speakers),
            "texts": len(texts),
        } | samples.diversity(texts)

    return measure, one.common
