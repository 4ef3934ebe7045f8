"""From names of presets, experiment files and flags to a Config; and what suits a text of the
user's own."""

import dataclasses
import math
import os
import runpy

from config import PRESETS, Config
from utils import runtime
from utils import tokenizer as tokenizers
from utils.cli import UserError, merge, nearest, reason


def family_defaults(objective, families):
    """What `--objective` sets (dict), whatever the preset has: what the family (of the dict
    `families`) needs."""
    needs = getattr(families.get(objective), "needs", {})
    names = {f.name for f in dataclasses.fields(Config)}
    return {name: allowed[0] for name, allowed in needs.items() if name in names}


def preset(name, families=()):
    """Differences of a preset, or of a Python file that defines `config = {...}`, from the
    defaults."""
    if name in PRESETS:
        return {"name": name} | PRESETS[name]
    if name.endswith(".py"):
        if not os.path.exists(name):
            raise UserError(f"there is no file {name}")
        try:
            settings = runpy.run_path(name).get("config")
        except (Exception, SystemExit) as error:  # whatever the user's file does
            raise UserError(f"{name} does not run: {reason(error)}") from None
        if not isinstance(settings, dict):
            raise UserError(f"{name} does not define config = {{...}}")
        settings, base = dict(settings), {}
        if "preset" in settings:
            base_name = settings.pop("preset")
            if not isinstance(base_name, str) or base_name not in PRESETS:
                raise UserError(
                    f"{name}: there is no preset {base_name}{nearest(base_name, PRESETS)}"
                )
            base = PRESETS[base_name]
        family = (
            family_defaults(str(settings["objective"]), families) if "objective" in settings else {}
        )
        return base | family | {"name": os.path.splitext(os.path.basename(name))[0]} | settings
    raise UserError(
        f"there is no preset {name}{nearest(name, PRESETS)} (--list shows all; a .py file works "
        "too)"
    )


OWN_MINUTES = 30.0  # of a run on a text of the user's own
# Such a text below so many bytes -> what suits it; scripts/lab/ablate.py own_text compares. passes:
# over the text, with which it is learned by heart.
SHORT_TEXTS = (
    (100_000, dict(tokenizer="char", n_layer=2, n_head=2, n_embd=128), 200),
    (2_000_000, dict(vocab_size=1024), 100),
)


def own_text(path, device, overrides):
    """(settings (dict) for a text of the user's own, a file or a folder of shards; what was chosen
    and how to get more): shape and rows of the preset for this device, smaller for a short text,
    for half an hour at most. overrides: what the user has named."""
    base = "stories_small" if device.type == "cpu" else "stories"
    size = os.path.getsize(path) if os.path.isfile(path) else math.inf  # or it is not here yet
    found = PRESETS[base] | {"tokenizer": "bpe", "max_iters": 0, "max_minutes": OWN_MINUTES}
    found["name"] = os.path.splitext(os.path.basename(os.path.normpath(path)))[0]
    for limit, changes, passes in SHORT_TEXTS:
        if size < limit:
            found |= changes | ({"tokenizer": "bpe"} if "vocab_size" in overrides else {})
            cfg = merge(Config, found, overrides)
            tokens = size if cfg.tokenizer == "char" else size / 4
            # the held-out tenth has two windows at least
            found["seq_len"] = min(cfg.seq_len, 2 ** max(4, int(math.log2(max(1, tokens) / 20))))
            cfg = merge(Config, found, overrides)
            found["max_iters"] = math.ceil(passes * tokens / (cfg.batch_size * cfg.seq_len))
            break
    cfg = merge(Config, found, overrides)
    shown = "" if size == math.inf else f", {size:,} bytes"
    kind = "characters" if cfg.tokenizer == "char" else f"BPE of {cfg.vocab_size:,}"
    limit = f"{OWN_MINUTES:g} minutes" + (f" or {cfg.max_iters:,} steps" if cfg.max_iters else "")
    return found, (
        f"your own data{shown}, on a {device.type}: {kind}, {cfg.n_layer} layers of {cfg.n_embd}, "
        f"{cfg.batch_size} rows a step, {limit} unless told otherwise: --max_minutes 120, say, or "
        f"a preset (train.py shakespeare --data {path})"
    )


def load(positional, overrides, families):
    """Command line of train.py (preset, flags) -> Config and one line that says what was chosen and
    why; families: `families.FAMILIES`."""
    if len(positional) > 1:
        raise UserError(f"one preset at a time, got {' '.join(positional)}")
    if positional:
        base, why = preset(positional[0], families), f"preset {positional[0]}: as asked"
    else:
        base, why = default(overrides)
    layers = [
        base,
        family_defaults(overrides["objective"], families) if "objective" in overrides else {},
        overrides,
    ]
    # a time that the user names replaces the preset's number of steps, and the other way round
    for named, replaced in (("max_minutes", "max_iters"), ("max_iters", "max_minutes")):
        if overrides.get(named) and replaced not in overrides:
            layers.append({replaced: 0})
    return merge(Config, *layers), why


def default(overrides):
    """(settings (dict), what was chosen and why) of a command line without a preset."""
    named = {name: value for name, value in overrides.items() if name == "device"}
    device = runtime.choose_device(merge(Config, named).device)  # one that config.py knows
    if "data" in overrides and overrides["data"] != "tales":
        return own_text(overrides["data"], device, overrides)
    stories = PRESETS["stories"]["data"]
    if not os.path.exists(stories):
        return preset("tales"), f"preset tales: the built-in corpus; no {stories} has been prepared"
    chosen = "stories_small" if device.type == "cpu" else "stories"
    why = f"preset {chosen}: {stories} has been prepared, for a {device.type}"
    if os.path.exists(tokenizers.DEFAULT):  # by scripts/train_tokenizer.py, to be used
        return preset(chosen) | {"tokenizer": tokenizers.DEFAULT}, why
    return preset(chosen), why
