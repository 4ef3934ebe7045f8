"""Checkpoints as folders that other programs read, model.safetensors, config.json and
tokenizer.json: written, read, and fetched from the Hugging Face hub."""

import json
import os
import re

from utils import cli, runtime
from utils.cli import UserError, reason
from utils.draws import at_least_float32

HUB = "hf:"  # before a name on the Hugging Face hub
FILES = ("model.safetensors", "config.json", "tokenizer.json")
# of a checkpoint, in config.json; the rest is weights and tokenizer
KEPT = ("version", "config", "sample", "step", "nll")


def write(state, folder, dtype):
    """Write the weights, without optimizer state, of a checkpoint (dict) that is sampled: the
    average where there is one. As numbers of that torch.dtype."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights = dict(state.get("ema") or state["model"])
    if weights["head.weight"].data_ptr() == weights["embedding.weight"].data_ptr():
        del weights["head.weight"]  # tied: a file holds it once
    weights = {name: value.to(dtype).contiguous() for name, value in weights.items()}
    with cli.replacing(os.path.join(folder, "model.safetensors"), SafetensorError) as temporary:
        save_file(weights, temporary)
    runtime.write_json(os.path.join(folder, "config.json"), {name: state[name] for name in KEPT})
    with (
        cli.replacing(os.path.join(folder, "tokenizer.json")) as temporary,
        open(temporary, "w", encoding="utf-8") as file,
    ):
        file.write(state["tokenizer"])


def read(folder, name):
    """The checkpoint (dict) that `write` wrote into the folder, its weights in float32; what it
    holds is not checked. name: what the user calls it."""
    from safetensors.torch import load_file

    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            state = dict(json.load(file))
        with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as file:
            state["tokenizer"] = file.read()
        weights = load_file(os.path.join(folder, "model.safetensors"))
        weights = {name: at_least_float32(value) for name, value in weights.items()}
        if state["config"].get("tie_embeddings") and "embedding.weight" in weights:
            weights["head.weight"] = weights["embedding.weight"]
    except Exception as error:  # any folder may be given, and safetensors has exceptions of its own
        raise UserError(
            f"{name} is no exported checkpoint, or a damaged one: {reason(error)}"
        ) from None
    return state | {"model": weights}


def repository(name):
    """(USER/NAME, revision or None) of hf:USER/NAME[@revision]."""
    found = re.fullmatch(rf"{HUB}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if not found:
        raise UserError(f"{name} is no name on the hub; expected {HUB}USER/NAME, or with @REVISION")
    return found.groups()


def fetch(name, files=FILES):
    """Folder of the cache with the files of hf:USER/NAME[@revision], fetched if need be. Nothing
    else of the repository is read, and no code of it is run."""
    import huggingface_hub

    repo_id, revision = repository(name)
    runtime.quiet_hub()
    try:
        return huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=list(files)
        )
    except Exception as error:  # those of the hub, of the network, of the disk
        raise UserError(
            f"cannot fetch {name}: {reason(error)}; is there such a name, and is the hub in reach?"
        ) from None


def is_ours(name):
    """Whether hf:NAME is a checkpoint of this program, and not a model of another. False where it
    cannot be looked at, or is a folder of this machine."""
    path = name.removeprefix(HUB)
    if os.path.isdir(path) or "/" not in path:  # gpt2 has no user
        return False
    try:
        return has_config(fetch(name, ["config.json"]))
    except UserError:
        return False


def has_config(folder):
    """Whether the folder has a config.json of this program."""
    try:
        with open(os.path.join(folder, "config.json"), "rb") as file:
            return set(KEPT) <= json.load(file).keys()
    except (OSError, ValueError, AttributeError, RecursionError):  # a stranger's file
        return False


def push(folder, repo_id, files):
    """Upload the files of the folder to the repository USER/NAME, which is made if need be; returns
    its address. One that holds a model of another program is left alone. Who does so is known from
    the hub's own login or HF_TOKEN."""
    import huggingface_hub

    runtime.quiet_hub()
    api, name = huggingface_hub.HfApi(), HUB + repo_id
    try:
        address = api.create_repo(repo_id, exist_ok=True)
        if api.file_exists(repo_id, "config.json") and not is_ours(name):
            raise UserError("it holds the model of another program; give another name")
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(files))
    except Exception as error:
        raise UserError(
            f"cannot push {folder} to {name}: {reason(error)}; all is in {folder}, and "
            "`hf auth login` says who you are"
        ) from None
    return str(address)
