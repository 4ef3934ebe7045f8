"""Checkpoints as files that other programs read: model.safetensors, config.json and tokenizer.json
in a folder, which all scripts take where they take a checkpoint.

    # the newest run's best, to artifacts/export/NAME; another
    python scripts/export.py
    python scripts/export.py --checkpoint artifacts/models/tales.best.pt --output my_folder
    # half as large: 8 digits of the 24 that a weight has in binary; and colder, if nobody says
    python scripts/export.py --output small --dtype bfloat16 --temperature 0.9
    # to the Hugging Face hub, with a model card; then: python inference.py --checkpoint hf:ME/tales
    python scripts/export.py --push ME/tales
    # and back
    python scripts/export.py --back my_folder --output artifacts/models/mine.best.pt
"""

import json
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import inference
from config import Config, SampleConfig
from utils import checkpoint, cli, exported, families, metrics
from utils.cli import UserError, field


@dataclass(frozen=True)
class ExportConfig:
    checkpoint: str = field(
        "", "file, folder or hf:USER/NAME (default: the newest run's best)", "what"
    )
    back: str = field("", "exported folder to make one file of instead")
    output: str = field(
        "", "folder to write (default: artifacts/export/NAME); with --back, the checkpoint's path"
    )
    dtype: str = field(
        "float32", "of the weights that are written", choices=("float32", "bfloat16")
    )
    temperature: float = field(
        None,
        "with which it is sampled unless a flag says otherwise (default: the checkpoint's); "
        "0.8:0.4 falls over the steps",
        low=0,
        ramp="final_temperature",
    )
    final_temperature: float = field(None, "what the temperature falls to", low=0)
    top_p: float = field(
        None, "top-p with which it is sampled (default: the checkpoint's)", above=0, high=1
    )
    push: str = field("", "upload the folder to the Hugging Face hub, as USER/NAME")

    def __post_init__(self):
        cli.check(self)


SAMPLED = (
    "temperature",
    "final_temperature",
    "top_p",
)  # flags that say how the exported model is sampled
CARD, TRACE = "README.md", "trace.gif"  # what a pushed folder has besides


def card(repo_id, model, cfg, state, report):
    """The model card (Markdown) of a checkpoint (dict): what it is, what it was trained on, how to
    load it, and how good it is by the report (dict, or None) of its run."""
    kind, name = families.family_of(cfg).name, repo_id.split("/")[1]
    judged = (
        f"```\n{metrics.show(report)}\n```"
        if report
        else f"The held-out bound of its run: {state['nll']:.4f} nats per token."
    )
    return f"""---
library_name: nanodlm
pipeline_tag: text-generation
tags: [diffusion-language-model]
---
# {name}

{kind[0].upper()}{kind[1:]}: {model.num_parameters():,} parameters ({cfg.n_layer} layers of
{cfg.n_embd} channels), windows of {cfg.seq_len} tokens. Trained by nanoDLM on
`{os.path.basename(cfg.data)}` for {state["step"]:,} steps of {cfg.batch_size} rows.

![A text of it, as it appears]({TRACE})

## How to use it

In a clone of nanoDLM:

    python inference.py --checkpoint {exported.HUB}{repo_id} --prompt "..."

## How good it is

{judged}
"""


def report_of(path, step):
    """The report (dict) that the run wrote of its checkpoint, the file at `path`, of that step;
    None: there is none."""
    if not path.endswith(".pt"):
        return None
    name = checkpoint.name_of(path).removesuffix(".best")
    folder = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    try:
        with open(os.path.join(folder, "logs", f"{name}.json"), encoding="utf-8") as file:
            report = json.load(file)
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and report.get("best_step") == step else None


def write_trace(folder, length):
    """A GIF of one text of at most that length as it appears, in an exported folder."""
    every = max(1, length // 64)  # some 60 pictures are enough
    target = os.path.join(folder, TRACE)
    inference.load(folder).generate(viz_gif=target, trace_every=every)


def check_folder(folder):
    """Complain of a folder that holds something else, which is not to be overwritten."""
    if os.path.isdir(folder) and os.listdir(folder):
        if not exported.has_config(folder):
            raise UserError(f"{folder} holds something else; give a new folder with --output")


def back(options, overrides):
    """An exported folder as one file."""
    if idle := [name for name in ("dtype", "push", "checkpoint", *SAMPLED) if name in overrides]:
        cli.refuse(options, idle, f"leave out --{idle[0]} with --back, which writes one file")
    if not options.output.endswith(".pt"):
        raise UserError(
            f"output={options.output}: say where to write the checkpoint, "
            "artifacts/models/mine.best.pt say"
        )
    if os.path.exists(options.output):
        raise UserError(f"{options.output} exists; give another --output")
    state = checkpoint.read(options.back)
    # complains of what does not fit
    checkpoint.restore(state, torch.device("cpu"), options.back)
    checkpoint.save(options.output, state)
    print(f"wrote {options.output}")


def run(positional, overrides):
    options = cli.merge(ExportConfig, overrides)
    if options.back:
        return back(options, overrides)
    repo_id = options.push.removeprefix(exported.HUB)
    if repo_id and exported.repository(exported.HUB + repo_id)[1]:
        raise UserError(f"push={options.push}: give USER/NAME without a revision")
    path = options.checkpoint or checkpoint.newest()
    folder = options.output or os.path.join(Config.out_dir, "export", checkpoint.name_of(path))
    check_folder(folder)
    state = checkpoint.read(path)
    wanted = {name: overrides[name] for name in SAMPLED if name in overrides}
    how = cli.merge(SampleConfig, checkpoint.sampling(state, path), wanted)
    state["sample"] = {name: getattr(how, name) for name in checkpoint.sample_defaults()}
    model, _, cfg = checkpoint.restore(state, torch.device("cpu"), path)
    exported.write(state, folder, getattr(torch, options.dtype))
    print(f"wrote {folder}/model.safetensors, config.json and tokenizer.json")
    if not repo_id:
        return
    write_trace(folder, cfg.seq_len)
    with (
        cli.replacing(os.path.join(folder, CARD)) as temporary,
        open(temporary, "w", encoding="utf-8") as file,
    ):
        file.write(card(repo_id, model, cfg, state, report_of(path, state["step"])))
    address = exported.push(folder, repo_id, (*exported.FILES, CARD, TRACE))
    print(f"pushed to {address}; anybody writes with --checkpoint {exported.HUB}{repo_id}")


main = cli.command(ExportConfig, run, __doc__, unexpected="Name the model with --checkpoint {}")
if __name__ == "__main__":
    cli.run(main)
