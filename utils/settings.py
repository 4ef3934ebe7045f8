"""From names of presets, experiment files and flags to a Config; and what suits a text of the
user's own."""

import dataclasses
import math
import os
import runpy

from config import PRESETS, Config
from utils import checkpoint, corpus, families, pairs, runs, runtime, texts
from utils import tokenizer as tokenizers
from utils.built_in import BUILT_IN
from utils.cli import UserError, merge, nearest, reason


def family_defaults(objective):
    """What `--objective` sets (dict), whatever the preset has: what its family needs."""
    needs = getattr(families.FAMILIES.get(objective), "needs", {})
    names = {f.name for f in dataclasses.fields(Config)}
    return {name: allowed[0] for name, allowed in needs.items() if name in names}


def preset(name):
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
        family = family_defaults(str(settings["objective"])) if "objective" in settings else {}
        return base | family | {"name": os.path.splitext(os.path.basename(name))[0]} | settings
    raise UserError(
        f"there is no preset {name}{nearest(name, PRESETS)} (--list shows all; a .py file works "
        "too)"
    )


OWN_MINUTES = 30.0  # of a run on a text of the user's own
# Such a text below so many bytes -> what suits it, and how many passes over it at most;
# scripts/lab/ablate.py own_text compares.
SHORT_TEXTS = (
    (
        100_000,
        dict(tokenizer="char", vocab_size=512, block_len=0, n_layer=2, n_head=2, n_embd=128),
        200,
    ),
    (2_000_000, dict(vocab_size=1024), 100),
    (math.inf, {}, 100),
)
LOOKED_AT = 10_000_000  # bytes: a longer file is not short, whatever its format


def own_text(path, device, overrides):
    """Settings (dict) for a text of the user's own, a file or a folder of shards: shape and rows of
    the preset for this device, or of the checkpoint that is to be tuned; smaller for a short text,
    and with fewer steps; half an hour at most. overrides: what the user has named."""
    base = "stories_small" if device.type == "cpu" else "stories"
    found = PRESETS[base] | {"tokenizer": "bpe", "max_iters": 0, "max_minutes": OWN_MINUTES}
    found["name"] = os.path.splitext(os.path.basename(os.path.normpath(path)))[0]
    tuned = overrides.get("init_from")
    if tuned:
        state = checkpoint.read(tuned)
        theirs = merge(Config, state["config"])
        found |= {name: getattr(theirs, name) for name in runs.SHAPE + runs.SUITS}
        is_char = tokenizers.from_json(state["tokenizer"]).is_char
        found["tokenizer"] = "char" if is_char else "bpe"
    elif "block_len" not in overrides and not fits(found | overrides):
        found["block_len"] = 0
    if "RANK" not in os.environ and not os.path.exists(path):
        texts.prepare(path)  # a corpus that is fetched: its length is to be known
    of_pairs = os.path.isfile(path) and pairs.in_file(path)
    if of_pairs:
        before = merge(Config, found)  # a question begins with a token that windows lack
        length = before.seq_len + (before.rows == "stream")
        found |= {"rows": "pair", "short_rows": 0.0, "seq_len": length}
    if not os.path.isfile(path) or os.path.getsize(path) > LOOKED_AT:
        return found
    documents = (pairs.read if of_pairs else texts.read_documents)(path)
    said = pairs.texts_of(documents) if of_pairs else documents
    size = sum(len(text.encode()) for text in said)
    for limit, changes, passes in SHORT_TEXTS:
        if size < limit:
            if tuned:
                return found | steps_of(documents, passes, found, overrides)
            found |= changes | ({"tokenizer": "bpe"} if "vocab_size" in overrides else {})
            found["seq_len"] = window_of(documents, found, overrides)
            return found | steps_of(documents, passes, found, overrides)
    return found


def fits(changes):
    """Whether the settings (dict) go together, as far as that can be said before there is a
    corpus."""
    try:
        families.checked(merge(Config, changes))
    except UserError:
        return False
    return True


def number_of_tokens(documents, cfg):
    """About how many the documents (list of str) have, before there is a tokenizer."""
    length = len if cfg.tokenizer == "char" else lambda text: len(text.encode()) / 4
    return max(1, sum(map(length, documents)))


def window_of(documents, found, overrides):
    """The largest window, a power of two, of which the held-out part of the documents (list of str)
    has two; of pairs one that holds the longest, and one token more. found, overrides: what is
    settled before."""
    cfg = merge(Config, found, overrides, {"max_iters": 1})
    if cfg.rows == "pair":
        longest = max(len("".join(pairs.texts_of([pair])).encode()) for pair in documents)
        tokens = 8 + (longest if cfg.tokenizer == "char" else longest / 2)
        return min(cfg.seq_len, 1 + 2 ** max(4, math.ceil(math.log2(tokens))))
    tokens = number_of_tokens(corpus.parts(cfg, documents)[1], cfg)
    return min(cfg.seq_len, 2 ** max(4, int(math.log2(tokens / 2))))


def steps_of(documents, passes, found, overrides):
    """Settings (dict) of so many passes over the documents (list of str); found, overrides: what is
    settled before."""
    cfg = merge(Config, found, overrides, {"max_iters": 1})
    train = corpus.parts(cfg, documents)[0][: cfg.max_documents or None]
    tokens = len(train) * cfg.seq_len if cfg.rows == "pair" else number_of_tokens(train, cfg)
    steps = math.ceil(passes * tokens / (cfg.batch_size * cfg.seq_len))
    return {"max_iters": steps, "eval_interval": min(cfg.eval_interval, max(5, steps // 20))}


def own_in_words(cfg, device):
    """What was chosen for a text of the user's own, and how to get more."""
    kind = {"char": "characters, ", "bpe": f"BPE of {cfg.vocab_size:,}, "}.get(cfg.tokenizer, "")
    if os.path.isdir(cfg.data) or cfg.init_from:  # which have tokens of their own
        kind = ""
    if cfg.block_len:
        kind += f"blocks of {cfg.block_len}, "
    limits = (
        f"{cfg.max_minutes:g} minutes" if cfg.max_minutes else "",
        f"{cfg.max_iters:,} steps" if cfg.max_iters else "",
    )
    limit = " or ".join(filter(None, limits))
    more = "--max_minutes 120" + (f" --max_iters {2 * cfg.max_iters}" if cfg.max_iters else "")
    return (
        f"your own data, on a {device.type}: {kind}{cfg.n_layer} layers of {cfg.n_embd}, windows "
        f"of {cfg.seq_len}, {cfg.batch_size} rows a step, at most {limit}; more with {more}, say, "
        f"or a preset: train.py shakespeare --data {cfg.data}"
    )


def load(positional, overrides):
    """Command line of train.py (preset, flags) -> Config and one line that says what was chosen and
    why."""
    if len(positional) > 1:
        raise UserError(f"one preset at a time, got {' '.join(positional)}")
    named = {name: value for name, value in overrides.items() if name == "device"}
    device = runtime.choose_device(merge(Config, named).device)  # one that config.py knows
    own = not positional and overrides.get("data", "tales") not in BUILT_IN
    if own:
        base, why = own_text(overrides["data"], device, overrides), ""
    else:
        chosen, why = (positional[0], "as asked") if positional else default(overrides, device)
        base, why = preset(chosen), f"preset {chosen}: {why}"
        made = base.get("data") in BUILT_IN
        if not positional and not made and os.path.exists(tokenizers.DEFAULT):
            base["tokenizer"] = tokenizers.DEFAULT  # scripts/train_tokenizer.py made it to be used
            size = tokenizers.load(tokenizers.DEFAULT).vocab_size
            why += f"; with {tokenizers.DEFAULT}, of {size:,} tokens"
    layers = [
        base,
        family_defaults(overrides["objective"]) if "objective" in overrides else {},
        overrides,
    ]
    # a time that the user names replaces the preset's number of steps, and the other way round; a
    # text of one's own is not read more often for that
    for first, other in (("max_minutes", "max_iters"), ("max_iters", "max_minutes"))[own:]:
        if overrides.get(first) and other not in overrides:
            layers.append({other: 0})
    cfg = merge(Config, *layers)
    return cfg, own_in_words(cfg, device) if own else why


def default(overrides, device):
    """(name of the preset of a command line that names none, why)."""
    stories, data = PRESETS["stories"]["data"], overrides.get("data")
    if data in BUILT_IN:
        return next(n for n, changes in PRESETS.items() if changes.get("data") == data), "as asked"
    if not os.path.exists(stories):
        return "tales", f"the built-in corpus; no {stories} has been prepared"
    chosen = "stories_small" if device.type == "cpu" else "stories"
    return chosen, f"{stories} has been prepared, for a {device.type}"
