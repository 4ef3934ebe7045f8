"""Checkpoints: one file that holds all that inference or a resumed run needs. Where one is read, a
folder of utils/exported.py may be given too, or hf:USER/NAME.

Tensors, numbers, strings, lists and dicts only, and loaded with weights_only=True, so that opening
a stranger's file runs no code. Written beside the old file and then renamed, so that a crash at any
moment leaves the old file whole.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
from dataclasses import dataclass

import torch

import config
from config import Config, SampleConfig
from model import Transformer, count_parameters
from utils import cli, exported, families, ranks, runtime
from utils import tokenizer as tokenizers
from utils.cli import UserError, reason

SHIPPED = os.path.join(Config.out_dir, "pretrained", "tales")

# what a resumed run may change (out_dir for "auto"); everything else would make it another run
MAY_CHANGE = set(
    "max_iters max_minutes save_interval track device dtype compile lr muon_lr lr_decay "
    "decay_share eval_interval final_rows final_masks final_samples resume micro_batch out_dir "
    "activation_checkpointing".split()
)


@dataclass
class Progress:
    """How far a run is. With weights and optimizers it is all that a resumed run needs, and part of
    a run's last checkpoint as it stands: what is random is a function of the seed and the step."""

    step: int = 0
    minutes: float = 0.0  # in all sessions
    nll: float = math.inf  # the last held-out bound, nats per token
    # sum of the training loss since the last evaluation: of this process, in a checkpoint of all
    running: torch.Tensor = None
    counted: int = 0  # steps in it
    density: torch.Tensor = None  # of times, with time_sampling=importance

    def fraction(self, cfg):
        """Fraction of the run's steps, or of its minutes, that is done."""
        steps = self.step / cfg.max_iters if cfg.max_iters else 0
        return max(steps, self.minutes / cfg.max_minutes if cfg.max_minutes else 0)


def save(path, state):
    """Write the dict `state` to `path`, all or nothing. A full disk or missing permission is a
    UserError."""
    # torch's zip writer turns a failed write into RuntimeError
    with cli.replacing(path, RuntimeError) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


ENTRIES = {
    "version": int,
    "config": dict,
    "sample": dict,
    "tokenizer": str,
    "step": int,
    "nll": float,
    "model": dict,
}
# these may be None or, in a file from before they were, missing
ENTRIES_OR_NONE = {"ema": dict, "corpus": str, "job": str, "density": torch.Tensor}
ENTRIES_TO_RESUME = {"scaler": dict, "optimizers": list} | {
    f.name: f.type for f in dataclasses.fields(Progress) if f.name not in ENTRIES_OR_NONE
}
PLAIN = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_state(state, path):
    """Complain of the first entry of what should be a checkpoint (dict) that is not as `snapshot`
    writes it: anybody may have made the file."""
    if not isinstance(state, dict) or type(state.get("version")) is not int:
        raise UserError(f"{path} is no checkpoint of this program")
    if state["version"] != config.VERSION:
        raise UserError(
            f"{path} has format {state['version']}, this program reads {config.VERSION}"
        )
    wanted = ENTRIES | (ENTRIES_TO_RESUME if "optimizers" in state else {})
    wanted |= {name: kind for name, kind in ENTRIES_OR_NONE.items() if state.get(name) is not None}
    for name, kind in wanted.items():
        if name not in state:
            raise UserError(f"{path} is no checkpoint of this program: it has no {name}")
        if not isinstance(state[name], kind) or isinstance(state[name], bool):
            raise UserError(
                f"{path} is damaged: its {name} is of type {type(state[name]).__name__}, not "
                f"{kind.__name__}"
            )
        counts = name in ("step", "minutes", "counted")
        if counts and not 0 <= state[name] < 2**53 or name == "nll" and math.isnan(state[name]):
            raise UserError(f"{path} is damaged: its {name} is {state[name]}")
    tensors = {name: state[name] for name, kind in wanted.items() if kind is torch.Tensor}
    for part in ("model", "ema"):
        tensors |= {
            f"{part}'s {name}": weights for name, weights in (state.get(part) or {}).items()
        }
    for name, tensor in tensors.items():
        # neither sparse nor without memory of its own, which a small file can make arbitrarily
        # large
        plain = (
            torch.is_tensor(tensor)
            and tensor.dtype in PLAIN
            and tensor.layout == torch.strided
            and not tensor.is_nested
            and (
                tensor.device.type == "cpu"
                and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
            )
        )
        if not plain or not tensor.isfinite().all():
            raise UserError(f"{path} is damaged: {name} is no tensor of finite numbers")
    if "optimizers" in state and not all(
        isinstance(value, (int, float)) for value in state["scaler"].values()
    ):
        raise UserError(f"{path} is damaged: its scaler holds something else than numbers")


@contextlib.contextmanager
def fitting(path):
    """Turn what happens where the contents of a checkpoint are of the right types, but not of this
    network, into a UserError."""
    try:
        yield
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        if cli.no_memory(error):
            raise
        raise UserError(f"{path} does not fit this program: {reason(error)}") from None
    except UserError as error:
        raise UserError(f"{path} does not fit this program: {error}") from None


def read(path):
    """The checkpoint (dict) at `path`: a file that `save` wrote, an exported folder (without what a
    resumed run needs), or hf:USER/NAME[@revision]. One that is missing, damaged or no checkpoint is
    a UserError."""
    if path.startswith(exported.HUB):
        state = exported.read(exported.fetch(path), path)
    elif os.path.isdir(path):
        state = exported.read(path, path)
    else:
        state = read_file(path)
    check_state(state, path)
    return state


def name_of(path):
    """What a checkpoint is called: NAME.best of artifacts/models/NAME.best.pt, the folder's name,
    NAME of hf:USER/NAME@revision."""
    path = exported.repository(path)[0] if path.startswith(exported.HUB) else path
    return os.path.basename(os.path.abspath(path)).removesuffix(".pt")


def read_file(path):
    """The dict that `save` wrote, or whatever else the file holds."""
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint {path}; train one with: python train.py")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    except Exception as error:
        # any file may be given, and the unpickler fails in many ways, at length
        raise UserError(
            f"{path} is no checkpoint, or a damaged one ({type(error).__name__}); take another, or "
            "train anew"
        ) from None


def newest(folder=os.path.join(Config.out_dir, "models"), best=True):
    """Path of the newest run's checkpoint in `folder`: its best file (or the last one, to
    resume)."""
    files = (
        [os.path.join(folder, f) for f in os.listdir(folder) if f.endswith(".pt")]
        if os.path.isdir(folder)
        else []
    )
    last = [f for f in files if not f.endswith(".best.pt")]
    if not files or not (last or best):
        raise UserError(f"there is no checkpoint in {folder}; train one with: python train.py")
    path = max(last or files, key=os.path.getmtime)
    candidate = path.removesuffix(".pt") + ".best.pt"
    return candidate if best and os.path.exists(candidate) else path


def default():
    """Path of the checkpoint to use where none is named: the newest run's best; before there is
    one, the tales that come with the repository, and that is said."""
    try:
        return newest()
    except UserError as error:
        if not os.path.isdir(SHIPPED):
            raise
        print(f"{error}. Until then: {SHIPPED}, which comes with nanoDLM", file=sys.stderr)
    return SHIPPED


def unused_name(out_dir, name):
    """`name`, or name-2, name-3, ...: the first that no run in out_dir has, finished or begun."""
    taken = set()
    for folder, ending in (("models", ".pt"), ("logs", ".jsonl")):
        path = os.path.join(out_dir, folder)
        files = os.listdir(path) if os.path.isdir(path) else []
        taken |= {f.removesuffix(ending).removesuffix(".best") for f in files if f.endswith(ending)}
    number = 1
    while (candidate := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return candidate


def interrupted(out_dir, name):
    """Path of the checkpoint to go on with where torchrun has started this process anew: that of
    the run called `name`, name-2, ..., that this job wrote; "" if there is none."""
    folder = os.path.join(out_dir, "models")
    if not ranks.restarted() or not os.path.isdir(folder):
        return ""
    runs = [
        os.path.join(folder, f)
        for f in os.listdir(folder)
        if re.fullmatch(rf"{re.escape(name)}(-\d+)?\.pt", f)
    ]
    for path in sorted(runs, key=os.path.getmtime, reverse=True):
        with contextlib.suppress(UserError):  # of another version, say
            if read(path).get("job") == ranks.torchrun_job():
                return path
    return ""


def snapshot(cfg, data, model, step, nll, **more):
    """State for `save`: what inference needs, and `more` for a resumed run. data is its Corpus, nll
    the last held-out bound."""
    return {
        "version": config.VERSION,
        "config": dataclasses.asdict(cfg),
        "sample": sample_defaults(),
        "corpus": data.fingerprint,
        "tokenizer": data.tokenizer.to_json(),
        "step": step,
        "nll": nll,
        "model": model.state_dict(),
        **more,
    }


def sample_defaults():
    """How config.py says that this model should be sampled: the group "how", but for the machine's
    own."""
    names = [f.name for f in dataclasses.fields(SampleConfig)]
    how = names[names.index("sampler") : names.index("device")]
    return {name: getattr(SampleConfig(), name) for name in how}


def sampling(state, path):
    """How the author of a checkpoint (dict) wanted it sampled (dict). A UserError where it says
    anything else: a file to write, say."""
    with fitting(path):
        if unknown := set(state["sample"]) - set(sample_defaults()):
            raise UserError(f"there is no way of sampling called {sorted(map(str, unknown))[0]}")
        how = cli.merge(SampleConfig, state["sample"])
        families.check_sampling(how)
    renamed = state["config"].get("objective") == "uniform" and "entropy_bounded" == how.sampler
    # before there was accept and renoise, the default's name meant the reverse process
    return state["sample"] | ({"sampler": ""} if renamed else {})


def restore(state, device, path="the checkpoint"):
    """(model on `device` in evaluation mode, Tokenizer, Config) of what `read` gave."""
    sampling(state, path)  # complains of what inference would
    with fitting(path):
        cfg = cli.merge(Config, state["config"])
        families.checked(cfg)
        tokenizer = tokenizers.from_json(state["tokenizer"])
        if cfg.rows == "pair" and tokenizers.with_roles(tokenizer) is not tokenizer:
            raise UserError("it is of pairs, and its tokenizer has no markers of roles")
        weights = state.get("ema") or state["model"]
        held = sum(
            w.numel()
            for name, w in weights.items()
            if not (cfg.tie_embeddings and name == "head.weight")
        )
        count = count_parameters(cfg, tokenizer.vocab_size)
        if held != count:  # before as much memory is taken
            raise UserError(
                f"it holds {held:,} weights, and the network of its config has {count:,}"
            )
        model = Transformer(cfg, tokenizer.vocab_size)
        model.load_state_dict(weights)
    return model.to(device).eval(), tokenizer, cfg


def resumed_config(positional, overrides):
    """(Config, checkpoint dict) for --resume: the run's own settings, with the allowed changes of
    the command line.

    The run goes on where its checkpoint lies, FOLDER/models/NAME.pt, so that no other run can be
    overwritten.
    """
    if positional:
        raise UserError(f"--resume takes its preset from the checkpoint; leave out {positional[0]}")
    folder = os.path.join(overrides.get("out_dir", Config.out_dir), "models")
    path = newest(folder, best=False) if overrides["resume"] == "auto" else overrides["resume"]
    state = read(path)
    if "optimizers" not in state:
        raise UserError(
            f"{path} holds weights only and cannot be resumed; use the run's last checkpoint, "
            f"NAME.pt without .best, or --init_from {path} to start a new run from it"
        )
    before = dataclasses.asdict(cli.merge(Config, state["config"]))
    for key, value in overrides.items():
        if key not in MAY_CHANGE and value != before[key]:
            raise UserError(
                f"--{key} {value} differs from the run's {before[key]}, and a resumed run cannot "
                f"change it; --init_from {path} starts a new run"
            )
    folder, file = os.path.split(os.path.abspath(path))
    if os.path.basename(folder) != "models":
        raise UserError(
            f"{path} is not in a folder models/; to go on with it, move it to "
            f"{Config.out_dir}/models/"
        )
    if "max_minutes" in overrides:  # a new limit replaces the old one of the other kind
        overrides.setdefault("max_iters", 0)
    elif "max_iters" in overrides:
        overrides["max_minutes"] = 0.0
    place = {"out_dir": os.path.relpath(os.path.dirname(folder)), "name": file.removesuffix(".pt")}
    cfg = cli.merge(Config, before, overrides, place)
    changed = [
        f"{k} {before[k]} -> {v}"
        for k, v in overrides.items()
        if k not in ("resume", "out_dir") and v != before[k]
    ]
    over = Progress(step=state["step"], minutes=state["minutes"]).fraction(cfg) >= 1
    report = os.path.join(cfg.out_dir, "logs", f"{cfg.name}.json")
    if over and reported_steps(report) == state["step"]:
        raise UserError(
            f"{path} is finished ({state['step']:,} steps, {state['minutes']:.1f} minutes); give a "
            "larger --max_iters or --max_minutes to go on"
        )
    if runtime.is_first():
        print(
            f"resuming {cfg.name} at step {state['step']:,}"
            + (f", with {', '.join(changed)}" if changed else "")
        )
    return cfg, state


def reported_steps(path):
    """How many steps the final metrics at `path` are about; None: there are none yet."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
