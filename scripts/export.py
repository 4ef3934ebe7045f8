"""Checkpoints as files that other programs read, and back: model.safetensors, config.json and
tokenizer.json in a folder.

    # the newest run's best, to artifacts/export/NAME; another
    python scripts/export.py
    python scripts/export.py --checkpoint artifacts/models/tales.best.pt --output my_folder
    # half as large: 8 digits of the 24 that a weight has in binary
    python scripts/export.py --output small --dtype bfloat16
    # and back
    python scripts/export.py --back my_folder --output artifacts/models/mine.best.pt
"""

import json
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from config import Config
from utils import checkpoint, cli, runtime
from utils.cli import UserError, field, reason
from utils.draws import at_least_float32

# of a checkpoint; the rest is weights and tokenizer
PLAIN = ("version", "config", "sample", "step", "nll")


@dataclass(frozen=True)
class ExportConfig:
    checkpoint: str = field("", "path (default: the newest run's best)", "what")
    back: str = field("", "folder to make a checkpoint of instead")
    output: str = field(
        "", "folder to write (default: artifacts/export/NAME); with --back, the checkpoint's path"
    )
    dtype: str = field(
        "float32", "of the weights that are written", choices=("float32", "bfloat16")
    )

    def __post_init__(self):
        cli.check(self)


def export(state, folder, dtype):
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
    runtime.write_json(os.path.join(folder, "config.json"), {name: state[name] for name in PLAIN})
    with (
        cli.replacing(os.path.join(folder, "tokenizer.json")) as temporary,
        open(temporary, "w", encoding="utf-8") as file,
    ):
        file.write(state["tokenizer"])


def read(folder):
    """The checkpoint (dict) that `export` wrote into the folder, its weights in float32."""
    from safetensors.torch import load_file

    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            state = dict(json.load(file))
        with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as file:
            state["tokenizer"] = file.read()
        state["model"] = load_file(os.path.join(folder, "model.safetensors"))
    except Exception as error:  # any folder may be given, and safetensors has exceptions of its own
        raise UserError(
            f"{folder} is no exported checkpoint, or a damaged one: {reason(error)}"
        ) from None
    checkpoint.check_state(state, folder)
    state["model"] = {name: at_least_float32(value) for name, value in state["model"].items()}
    if state["config"].get("tie_embeddings") and "embedding.weight" in state["model"]:
        state["model"]["head.weight"] = state["model"]["embedding.weight"]
    return state


def run(positional, overrides):
    options = cli.merge(ExportConfig, overrides)
    if options.back:
        if "dtype" in overrides:
            raise UserError(
                f"dtype={options.dtype} with back={options.back}: a checkpoint has float32; leave "
                "out --dtype"
            )
        if not options.output.endswith(".pt"):
            raise UserError(
                f"output={options.output}: say where to write the checkpoint, "
                "artifacts/models/mine.best.pt say"
            )
        if os.path.exists(options.output):
            raise UserError(f"{options.output} exists; give another --output")
        state = read(options.back)
        # complains of what does not fit
        checkpoint.restore(state, torch.device("cpu"), options.back)
        checkpoint.save(options.output, state)
        return print(f"wrote {options.output}")
    path = options.checkpoint or checkpoint.newest()
    state = checkpoint.read(path)
    checkpoint.restore(state, torch.device("cpu"), path)
    folder = options.output or os.path.join(
        Config.out_dir, "export", os.path.basename(path).removesuffix(".pt")
    )
    export(state, folder, getattr(torch, options.dtype))
    print(f"wrote {folder}/model.safetensors, config.json and tokenizer.json")


main = cli.command(ExportConfig, run, __doc__, unexpected="Name the model with --checkpoint {}")
if __name__ == "__main__":
    cli.run(main)
