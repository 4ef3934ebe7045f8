"""What is trained and compared: each comparison is a function from ablate.py's options to a dict of
variants, name -> differences from the base, in order; a new one is a function and an entry of
TRAINED.
"""

import dataclasses

import config
import diffusion
from config import Config
from utils import cli, settings
from utils.cli import UserError

SMALL = dict(n_layer=4, n_head=4, n_embd=128, seq_len=64, batch_size=64, lr=0.01)


def other_lengths(rows, steps):
    """Our recipe in other numbers of steps; and with half the rows a step."""
    half = {"batch_size": max(1, rows // 2)}
    return (
        {
            f"our recipe, {share:g} of the steps": {"max_iters": max(1, round(share * steps))}
            for share in (0.4, 0.6, 0.8, 1.5, 2, 2.5)
        }
        | {"our recipe": {}}
        | {
            f"our recipe, half the rows a step, {share:g} of all rows": half
            | {"max_iters": round(2 * share * steps)}
            for share in (0.6, 0.8, 1)
        }
    )


# our recipe without each of its parts, and with what it leaves out
OTHER_PARTS = {
    "the micro-dLLMs' optimizer: AdamW 3e-4, constant": {
        name: config.MICRO[name]
        for name in "optimizer lr beta1 beta2 weight_decay warmup_iters lr_decay".split()
    },
    "AdamW for all, 3e-3": {"optimizer": "adamw", "lr": 3e-3},
    "the bound as loss": {"loss_weighting": "elbo"},
    "flat loss": {"loss_weighting": "flat"},
    "beta1 0.9": {"beta1": 0.9},
    "beta1 0.8": {"beta1": 0.8},
    "no warm-up": {"warmup_iters": 0},
    "no decay": {"lr_decay": "constant"},
    "decay over the whole run": {"decay_share": 1.0},
    "cosine decay over the whole run": {"decay_share": 1.0, "lr_decay": "cosine"},
    "projections and head start at zero": {"init": "zero"},
    "projections and head start as the rest": {"init": "normal"},
    "rotary base 10,000": {"rope_base": 10_000.0},
    "rotary base 100": {"rope_base": 100.0},
    "masks drawn one by one": {"corruption": "bernoulli"},
    "loss at all positions": {"loss_weighting": "full"},
    "tied embeddings": {"tie_embeddings": True},
    "embeddings of their own": {"tie_embeddings": False},
    "logits capped at 15": {"softcap": 15.0},
    "gradients not clipped": {"grad_clip": 0.0},
    "dropout 0.1": {"dropout": 0.1},
    "weight decay 0.1": {"weight_decay": 0.1},
    "no short rows": {"short_rows": 0.0},
}


def recipe(options):
    """The micro-dLLMs' recipe and ours; ours shorter and longer, without each of its parts, and
    with what it leaves out. What a base has already is left out of its table."""
    base = cli.merge(Config, base_config(options))
    loss = "full" if base.tokenizer == "char" else "pooled"  # as in the two micro-dLLMs
    published = config.MICRO | {
        "rows": base.rows,
        "loss_weighting": loss,
        "dtype": "float32",
        "compile": "off",
    }
    variants = {
        f"the micro-dLLMs' recipe, {options.published_iters} steps": published
        | {"max_iters": options.published_iters}
    }
    variants |= other_lengths(base.batch_size, options.iters) | OTHER_PARTS
    return {
        name: changes
        for name, changes in variants.items()
        if not changes or cli.merge(Config, base_config(options), changes) != base
    }


def batch_size(options):
    """As many rows in more or fewer steps, with the same learning rates and with their square root
    law."""
    base, shares = cli.merge(Config, base_config(options)), (0.25, 0.5, 1, 2, 4)
    plain = {
        share: {
            "batch_size": round(base.batch_size * share),
            "max_iters": max(1, round(options.iters / share)),
        }
        for share in shares
    }
    return {f"{changes['batch_size']} rows": changes for changes in plain.values()} | {
        f"{plain[share]['batch_size']} rows, learning rates {share**0.5:.2g} times": plain[share]
        | {"lr": base.lr * share**0.5, "muon_lr": base.muon_lr * share**0.5}
        for share in shares
        if share != 1
    }


def families(options):
    """Autoregressive, blocks, masked and uniform at equal size, on the same rows. In windows of
    blocks of 64."""
    base = cli.merge(Config, base_config(options))
    bos, tokens = diffusion.bos_tokens(base), base.seq_len * base.batch_size
    window = max(128, -(-base.seq_len // 64) * 64) + bos
    common = {"seq_len": window}
    if not bos:  # as many tokens a step; documents stay as many
        common["batch_size"] = max(1, tokens // window)
    uniform = settings.family_defaults("uniform") | {
        "objective": "uniform",
        "time_conditioning": "sinusoidal",  # adaln is larger
    }
    return (
        {"autoregressive": common | {"objective": "ar"}}
        | {f"blocks of {size}": common | {"block_len": size} for size in (1, 4, 16, 64)}
        | {"masked": common, "uniform noise": common | uniform}
    )


def ar_vs_diffusion(options):
    """Many epochs over 200 documents: who overfits when. The loss of all is the bound, so that
    curves compare."""
    common = {"max_documents": 200, "loss_weighting": "elbo", "short_rows": 0.0}
    return {
        f"{name}{f', dropout {dropout:g}' if dropout else ''}": common
        | changes
        | {"dropout": dropout}
        for name, changes in (("autoregressive", {"objective": "ar"}), ("masked", {}))
        for dropout in (0.0, 0.1, 0.2)
    }


class CausalMasked(diffusion.Masked):
    """Masked diffusion whose network sees only what is to the left."""

    def logits(self, model, ids, index=None, earlier=None):
        return model(
            ids, (ids == model.vocab_size - 1).float().mean(1), attention="causal", select=index
        )


# of the comparison `attention`; families.FAMILIES has them while a variant is trained
OWN_FAMILIES = {"masked, causal": CausalMasked}


def window(options):
    """Windows of other lengths, with as many tokens a step; each judged on its own windows of the
    same text."""
    base = cli.merge(Config, base_config(options))
    return {
        f"{size} tokens": {
            "seq_len": size,
            "batch_size": max(1, base.batch_size * base.seq_len // size),
            "eval_rows": 16_384 // size,
            "final_rows": 65_536 // size,
        }
        for size in (16, 32, 64, 128, 256)
    }


def blocks(base, n):
    """Blocks of n, which fill the window; masks of the whole window where n is 0."""
    bos = diffusion.bos_tokens(base)
    filled = (base.seq_len - bos) // n * n + bos if n else base.seq_len
    return {"block_len": n, "seq_len": filled}


def small(options):
    """A small network on a small machine: shapes, vocabularies, rows, and what helps when a text is
    read many times; for a number of --minutes each."""
    base = cli.merge(Config, base_config(options))
    rows, window, bos = base.batch_size, base.seq_len, diffusion.bos_tokens(base)
    ar = {"objective": "ar", "block_len": 0}
    variants = {
        "a document a row": {"rows": "document", "seq_len": window - bos + 1},
        "vocabulary 1,024": {"vocab_size": 1024},
        "vocabulary 2,048": {"vocab_size": 2048},
        "vocabulary 4,096": {"vocab_size": 4096},
        "vocabulary 8,192": {"vocab_size": 8192},
        "6 layers": {"n_layer": 6},
        "8 layers": {"n_layer": 8},
        "width 192": {"n_embd": 192},
        "width 384": {"n_embd": 384, "n_head": 6},
        "half the rows": {"batch_size": rows // 2},
        "twice the rows": {"batch_size": 2 * rows},
        "half the window, twice the rows": {"seq_len": window // 2, "batch_size": 2 * rows},
        "twice the window, half the rows": {"seq_len": 2 * window, "batch_size": rows // 2},
        "learning rates 0.6 times": {"lr": 0.6 * base.lr, "muon_lr": 0.6 * base.muon_lr},
        "learning rates 1.7 times": {"lr": 1.7 * base.lr, "muon_lr": 1.7 * base.muon_lr},
        "dropout 0.1": {"dropout": 0.1},
        "the bound as loss": {"loss_weighting": "elbo"},
        "no short rows": {"short_rows": 0.0},
        "rotary base 10,000": {"rope_base": 10_000.0},
        "embeddings of their own": {"tie_embeddings": False, "init": "zero"},
        "weight decay 0.1": {"weight_decay": 0.1},
        "averaged weights": {"ema": 0.999, "lr_decay": "constant"},
        "masked": blocks(base, 0),
        "blocks of 2": blocks(base, 2),
        "blocks of 4": blocks(base, 4),
        "blocks of 8": blocks(base, 8),
        "blocks of 16": blocks(base, 16),
        "autoregressive": ar,
        "autoregressive, dropout 0.1": ar | {"dropout": 0.1},
    }
    return {"as it is": {}} | {
        name: changes
        for name, changes in variants.items()
        if cli.merge(Config, base_config(options), changes) != base
    }


def own_text(options):
    """What suits a text of its length: characters or a BPE, the size of the network, blocks or not;
    for a number of --minutes each, judged at their best."""
    texts = {"characters": {"tokenizer": "char"}} | {
        f"BPE of {size:,}": {"tokenizer": "bpe", "vocab_size": size} for size in (1024, 4096)
    }
    shapes = {"2 x 128": (2, 2, 128), "4 x 256": (4, 4, 256)}
    base = cli.merge(Config, base_config(options))
    families = {"masked": blocks(base, 0), "blocks of 4": blocks(base, 4)}
    return {
        f"{kind}, {shape}, {family}": text
        | dict(zip(("n_layer", "n_head", "n_embd"), sizes))
        | objective
        for kind, text in texts.items()
        for shape, sizes in shapes.items()
        for family, objective in families.items()
    }


def expected_loss(options):
    """The beginnings of the guide's and the notes' runs, whose documents say which loss to expect
    when, at the base's shape, and ours. Their learning rates do not decay yet; their losses are
    their own. Windows of 128, as theirs."""
    shape = ("data", "tokenizer", "rows", "n_layer", "n_head", "n_embd", "seq_len")
    theirs = {
        f"the recipe of the {name}": {
            key: value for key, value in config.PRESETS[name].items() if key not in shape
        }
        | {"lr_decay": "constant", "max_iters": options.iters}
        for name in ("guide", "notes")
    }
    return {
        name: changes | {"seq_len": 128, "final_samples": 1}
        for name, changes in (
            theirs
            | {
                "our recipe": {},
                "our recipe, a fifth of the steps": {"max_iters": max(1, options.iters // 5)},
            }
        ).items()
    }


def sudoku(options):
    """What suits grids, for a number of --minutes each."""
    base = cli.merge(Config, base_config(options))
    return {
        "as it is": {},
        "rotary base 100": {"rope_base": 100.0},
        "6 layers": {"n_layer": 6},
        "8 layers of 96": {"n_layer": 8, "n_embd": 96},
        "8 heads": {"n_head": 8},
        "flat loss": {"loss_weighting": "flat"},
        "half the rows": {"batch_size": base.batch_size // 2},
        "twice the rows": {"batch_size": 2 * base.batch_size},
        "learning rates 0.6 times": {"lr": 0.6 * base.lr, "muon_lr": 0.6 * base.muon_lr},
        "learning rates 1.7 times": {"lr": 1.7 * base.lr, "muon_lr": 1.7 * base.muon_lr},
        "everything in pairs of complementary rows": {"complementary": True},
        "linear decay over the whole run": {"decay_share": 1.0},
    }


def puzzles(options):
    """Families on grids, which fill the holes of puzzles, and on pairs of a puzzle and its grid.
    All have the preset's shape, and as many minutes."""
    as_pairs = {"rows": "pair", "short_rows": 0.0}
    asked = as_pairs | {"data": "sudoku6_asked", "seq_len": 92}
    solver = as_pairs | {"data": "sudoku6_solver", "seq_len": 119, "objective": "ar"}
    uniform = settings.family_defaults("uniform") | {
        "objective": "uniform",
        "time_conditioning": "sinusoidal",  # adaln is larger
    }
    return {
        "masked": {},
        "uniform noise": uniform,
        "uniform noise, cross entropy": config.CANVAS | {"ar_weight": 0.0},
        "autoregressive": {"objective": "ar"},
        "masked, pairs": asked,
        "blocks of 7, pairs": asked | {"block_len": 7},
        "autoregressive, pairs": asked | {"objective": "ar"},
        "autoregressive, pairs in the solver's order": solver,
    }


def canvas(options):
    """The recipe of DiffusionGemma in small, in thirds of a row; without each of its ingredients;
    and masks. All have the same window, which every length of blocks fills."""
    base = cli.merge(Config, base_config(options))
    bos = diffusion.bos_tokens(base)
    n = (base.seq_len - bos) // 6 * 2
    if base.rows == "document" and base.seq_len != bos + 3 * n:
        raise UserError(f"canvas cuts rows into thirds; {base.seq_len - bos} tokens have none")
    base = dataclasses.replace(base, seq_len=bos + 3 * n)
    masks, whole = {"seq_len": base.seq_len, "block_len": 0}, config.CANVAS | blocks(base, n)
    without = {
        "told the noise level": {"time_conditioning": "adaln"},
        "cross entropy at corrupted positions": {"loss_weighting": "flat"},
        "the bound as loss": {"loss_weighting": "elbo", "schedule": "poly2", "init": "normal"}
        | {"time_conditioning": "adaln"},
        "no self-conditioning": {"self_conditioning": 0.0},
        "no autoregressive loss": {"ar_weight": 0.0},
        f"blocks of {n // 2}": blocks(base, n // 2),
        f"blocks of {n // 2 * 3}": blocks(base, n // 2 * 3),
        "one canvas": {"block_len": 0, "ar_weight": 0.0},
    }
    return {
        "masked": masks,
        "masked, self-conditioning": masks | {"self_conditioning": 0.5},
        f"masked, blocks of {n}": blocks(base, n),
        "canvas": whole,
    } | {f"canvas, {name}": whole | changes for name, changes in without.items()}


DISCRETE = dict(corruption="bernoulli")  # what discrete times need
TRAINED = {
    "recipe": recipe,
    "optimizer": lambda options: (
        {
            f"Muon {muon:g}, AdamW {lr:g}": {"muon_lr": muon, "lr": lr}
            for muon in (0.01, 0.02, 0.03, 0.04)
            for lr in (5e-3, 1e-2, 2e-2)
        }
        | {
            f"AdamW {lr:g}": {"optimizer": "adamw", "lr": lr}
            for lr in (3e-4, 1e-3, 3e-3, 6e-3, 1e-2)
        }
        | {
            f"AdamW {lr:g}, 50 steps of warm-up": {
                "optimizer": "adamw",
                "lr": lr,
                "warmup_iters": 50,
            }
            for lr in (3e-3, 6e-3, 1e-2)
        }
    ),
    "weighting": lambda options: {
        name: {"loss_weighting": name} for name in ("elbo", "flat", "clip", "pooled", "full")
    },
    "schedule": lambda options: (
        {name: {"schedule": name} for name in diffusion.SCHEDULES}
        | {
            f"{name}, the bound as loss": {"schedule": name, "loss_weighting": "elbo"}
            for name in diffusion.SCHEDULES
        }
    ),
    "time_conditioning": lambda options: {
        "none": {},
        "sinusoidal": {"time_conditioning": "sinusoidal"},
        "adaln": {"time_conditioning": "adaln"},
        "table of 100": DISCRETE | {"time_conditioning": "table", "diffusion_steps": 100},
        "none, the same masks as the table": DISCRETE | {"diffusion_steps": 100},
    },
    "batch_size": batch_size,
    "diffusion_steps": lambda options: (
        {f"T = {T}": DISCRETE | {"diffusion_steps": T} for T in (10, 30, 50, 100, 300, 1000)}
        | {"continuous": DISCRETE, "continuous, counts": {}}
    ),
    "ema": lambda options: (
        {"none": {}}
        | {f"{decay:g}": {"ema": decay} for decay in (0.9, 0.95, 0.98, 0.99, 0.995, 0.999)}
        | {
            f"{decay:g}, no decay of the learning rate": {"ema": decay, "lr_decay": "constant"}
            for decay in (0.0, 0.95, 0.98, 0.99, 0.995)
        }
    ),
    "complementary": lambda options: {"independent": {}, "complementary": {"complementary": True}},
    "time_sampling": lambda options: {
        f"{name}, {weighting}": {"time_sampling": name, "loss_weighting": weighting}
        for weighting in ("elbo", "flat")
        for name in ("uniform", "importance")
    },
    "attention": lambda options: {
        "both sides": {},
        "from the left": {"objective": "masked, causal"},
    },
    "window": window,
    "expected_loss": expected_loss,
    "small": small,
    "own_text": own_text,
    "families": families,
    "ar_vs_diffusion": ar_vs_diffusion,
    "sudoku": sudoku,
}


def base_config(options):
    base = (
        config.PRESETS["shakespeare"] | SMALL if not options.base else settings.preset(options.base)
    )
    data = {"data": options.data, "tokenizer": "bpe"} if options.data else {}
    return (
        {"name": "run"}
        | base
        | data
        | {
            "max_iters": 0 if options.minutes else options.iters,
            "max_minutes": options.minutes,
            "device": options.device,
            "dtype": options.dtype,
            "compile": options.compile,
            "eval_rows": 256,
            "final_rows": 1024,
            "final_masks": 2,
            "final_samples": 0,
        }
    )
