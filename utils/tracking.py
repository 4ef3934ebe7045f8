"""Live curves of a run, by Weights & Biases, trackio or TensorBoard. A package is imported only
when --track names it; the log of the run stays what it is.

To add a tracker, write a function and an entry in TRACKERS. It is given the run's Config, its
`identity` (what the function returned when the run began; None: it begins) and how many steps are
done, and returns (identity, log, close), log being a function of (step, {name: number}, text).

A run that is killed goes on from its last checkpoint, and so repeats steps that were logged
already: TensorBoard drops the old points, wandb the new ones, and trackio keeps both.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import secrets

from tqdm import tqdm

from utils import cli, page, runtime
from utils.cli import UserError, reason

PROJECT = "nanodlm"


def by_wandb(cfg, identity, step):
    """https://wandb.ai; without a login, set WANDB_MODE=offline."""
    import wandb

    run = wandb.init(
        project=PROJECT,
        name=cfg.name,
        id=identity,
        resume="allow",
        dir=os.path.abspath(cfg.out_dir),  # its helper process has a folder of its own
        config=dataclasses.asdict(cfg),
    )

    def log(step, figures, text=""):
        sample = {"sample": wandb.Html(page.escaped(text))} if text else {}
        run.log(figures | sample, step=step)

    return run.id, log, run.finish


def by_trackio(cfg, identity, step):
    """On this machine: the command `trackio show` opens the curves."""
    import trackio

    run = trackio.init(
        project=PROJECT,
        name=identity or f"{cfg.name}-{secrets.token_hex(3)}",  # all folders share a database
        resume="allow",
        config=dataclasses.asdict(cfg),
        embed=False,
    )

    def log(step, figures, text=""):
        sample = {"sample": trackio.Markdown(verbatim(text))} if text else {}
        trackio.log(figures | sample, step=step)

    return run.name, log, trackio.finish


def by_tensorboard(cfg, identity, step):
    """In OUT_DIR/tensorboard/NAME: tensorboard --logdir artifacts/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    folder = os.path.join(cfg.out_dir, "tensorboard", cfg.name)
    writer = SummaryWriter(folder, purge_step=step + 1 if step else None)
    if not identity:
        writer.add_text("config", verbatim(json.dumps(dataclasses.asdict(cfg), indent=1)), 0)

    def log(step, figures, text=""):
        for name, number in figures.items():
            writer.add_scalar(name, number, step)
        if text:
            writer.add_text("sample", verbatim(text), step)
        writer.flush()

    return cfg.name, log, writer.close


def verbatim(text):
    """A text as Markdown that shows it as it stands."""
    return "".join(f"    {line}\n" for line in text.split("\n"))


TRACKERS = {"wandb": by_wandb, "trackio": by_trackio, "tensorboard": by_tensorboard}


def nowhere(step, figures, text=""):
    """The log of a run that is not tracked."""


def check(name):
    """Complain of a tracker that there is not, or whose package is missing."""
    cli.check_name("tracker", name, TRACKERS)
    try:
        importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"track={name} needs a package: pip install {name}; or leave out --track"
        ) from None


def guarded(do, name, broken):
    """The function `do`, whose exceptions are told, once, and collected in the list `broken`: then
    it does nothing more, and training goes on without curves."""

    def careful(*args):
        if broken:
            return
        try:
            do(*args)
        except Exception as error:
            broken.append(error)
            tqdm.write(f"{name} no longer tracks this run: {reason(error)}")

    return careful


def start(cfg, step):
    """(log, close) of the tracker that cfg.track names, for a run of which `step` steps are done.
    The run's identity is kept beside its log, so that resuming goes on with the same curves."""
    path, known = os.path.join(cfg.out_dir, "logs", f"{cfg.name}.track"), {}
    if step:
        with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
            known = dict(json.load(file))
    try:
        identity, log, close = TRACKERS[cfg.track](cfg, known.get(cfg.track), step)
    except Exception as error:  # a login that is missing, a server out of reach
        raise UserError(f"cannot track by {cfg.track}: {reason(error)}") from None
    runtime.write_json(path, known | {cfg.track: identity})
    broken = []
    return guarded(log, cfg.track, broken), guarded(close, cfg.track, broken)
