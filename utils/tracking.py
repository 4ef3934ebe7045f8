"""Live curves of a run, by Weights & Biases, trackio or TensorBoard. A package is imported only
when --track names it; the log of the run stays what it is.

To add a tracker, write a function and an entry in TRACKERS. It is given the run's Config, its
`identity` (what the function returned when the run began; None: it begins) and the first step that
comes, and returns (identity, log, close), log being a function of (step, {name: number}, text).
"""

import dataclasses
import json
import os

from tqdm import tqdm

from utils import page, runtime
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
        dir=cfg.out_dir,
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
        name=identity or cfg.name,
        resume="must" if identity else "never",
        config=dataclasses.asdict(cfg),
        embed=False,
    )

    def log(step, figures, text=""):
        sample = {"sample": trackio.Markdown(text)} if text else {}
        trackio.log(figures | sample, step=step)

    return run.name, log, trackio.finish


def by_tensorboard(cfg, identity, step):
    """In OUT_DIR/tensorboard/NAME: tensorboard --logdir artifacts/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    # what a stopped run wrote beyond its last checkpoint is dropped
    writer = SummaryWriter(
        os.path.join(cfg.out_dir, "tensorboard", cfg.name), purge_step=step or None
    )
    if not identity:
        settings = json.dumps(dataclasses.asdict(cfg), indent=1).replace("\n", "\n    ")
        writer.add_text("config", f"    {settings}", 0)

    def log(step, figures, text=""):
        for name, number in figures.items():
            writer.add_scalar(name, number, step)
        if text:
            writer.add_text("sample", text, step)
        writer.flush()

    return cfg.name, log, writer.close


TRACKERS = {"wandb": by_wandb, "trackio": by_trackio, "tensorboard": by_tensorboard}


def nowhere(step, figures, text=""):
    """The log of a run that is not tracked."""


def guarded(log, name):
    """The log, which after an exception does nothing more: training goes on without curves."""
    broken = []

    def careful(step, figures, text=""):
        if broken:
            return
        try:
            log(step, figures, text)
        except Exception as error:
            broken.append(error)
            tqdm.write(f"{name} no longer tracks this run: {reason(error)}")

    return careful


def start(cfg, step):
    """(log, close) of the tracker that cfg.track names, for a run of which `step` steps are done.
    The run's identity is kept beside its log, so that resuming goes on with the same curves."""
    identity, path = None, os.path.join(cfg.out_dir, "logs", f"{cfg.name}.track")
    if step and os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            identity = json.load(file).get(cfg.track)
    try:
        identity, log, close = TRACKERS[cfg.track](cfg, identity, step)
    except ImportError:
        raise UserError(
            f"track={cfg.track} needs a package: pip install {cfg.track}; or leave out --track"
        ) from None
    except Exception as error:  # a login that is missing, a server out of reach
        raise UserError(f"cannot track by {cfg.track}: {reason(error)}") from None
    runtime.write_json(path, {cfg.track: identity})
    return guarded(log, cfg.track), close
