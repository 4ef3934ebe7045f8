"""Live curves, by the real packages, none of which reaches a server here."""

import glob
import json
import os
import sys

import pytest
from conftest import TINY, interrupt, load, resumed, run

import train
from utils import tracking

WANTED = {"loss", "bound", "bound_se_rows"}  # at each evaluation
OF_A_STEP = {"loss_of_step", "gradient_norm", "tokens_per_second"} | {
    "learning_rate_adamw",
    "learning_rate_muon",
}


def curves_of_tensorboard():
    """{figure: its steps}, the texts, and how many runs there are."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [folder] = glob.glob("artifacts/tensorboard/*")
    found = EventAccumulator(folder).Reload()
    tags = found.Tags()
    curves = {tag: [event.step for event in found.Scalars(tag)] for tag in tags["scalars"]}
    texts = {tag: found.Tensors(tag)[-1].tensor_proto.string_val[0] for tag in tags["tensors"]}
    return curves, {tag.removesuffix("/text_summary") for tag in texts}, 1


def curves_of_trackio():
    from trackio.sqlite_storage import SQLiteStorage

    # all that the process tracks is in one database
    identity = json.load(open("artifacts/logs/tales.track"))["trackio"]
    logs = SQLiteStorage.get_logs(tracking.PROJECT, identity)
    curves = {}
    for entry in logs:
        for name in entry.keys() - {"step", "timestamp"}:
            curves.setdefault(name, []).append(entry["step"])
    texts = {name for name in ("sample",) if curves.pop(name, None)}
    config = SQLiteStorage.get_run_config(tracking.PROJECT, identity)
    return curves, texts | ({"config"} if config["n_embd"] == 16 else set()), 1


READERS = {"tensorboard": curves_of_tensorboard, "trackio": curves_of_trackio}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "TRACKED", 2)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def stopped_and_resumed(kind, monkeypatch, at=4):
    """A run of 6 steps that is stopped while it draws the batch of step `at`, so after one more,
    and goes on."""
    words = ["tales", *TINY, "--track", kind, "--eval_interval", "2", "--save_interval", "2"]
    with monkeypatch.context() as patch:
        interrupt(patch, at, 2)
        train.train(load(words)[0])
    train.train(*resumed(["--resume", "artifacts/models/tales.pt"]))


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("at", (1, 3, 4))
def test_curves(kind, at, monkeypatch):
    """Config, figures and a sample; a run that goes on goes on in the same curves, wherever it was
    stopped: at a point of the curves (3), between two, before the first."""
    stopped_and_resumed(kind, monkeypatch, at)
    curves, texts, runs = READERS[kind]()
    assert curves.keys() >= WANTED | OF_A_STEP and texts == {"config", "sample"} and runs == 1
    assert sorted(curves["bound"]) == [2, 4, 6] and sorted(curves["loss_of_step"]) == [2, 4, 6]
    lines = [json.loads(line) for line in open("artifacts/logs/tales.jsonl")]
    assert [line["step"] for line in lines] == [2, 4, 6], "the log stays what it is"


def test_curves_by_wandb(monkeypatch):
    """Both sessions are parts of one run, which `wandb sync` would put together."""
    stopped_and_resumed("wandb", monkeypatch)
    parts = sorted(glob.glob("artifacts/wandb/offline-run-*/run-*.wandb"))
    assert len(parts) == 2 and len({part.rsplit("run-", 1)[1] for part in parts}) == 1
    written = b"".join(open(part, "rb").read() for part in parts)
    for name in WANTED | OF_A_STEP | {"sample", "n_embd"}:
        assert name.encode() in written, name
    assert glob.glob("artifacts/wandb/offline-run-*/files/media/html/sample*.html")


def test_trackers_take_turns(monkeypatch):
    """A run that another tracker has seen in between goes on in its first curves."""
    stopped_and_resumed("wandb", monkeypatch)
    for steps, kind in ((8, "tensorboard"), (10, "wandb")):
        words = ["--resume", "auto", "--track", kind, "--max_iters", str(steps)]
        train.train(*resumed(words))
    parts = glob.glob("artifacts/wandb/offline-run-*/run-*.wandb")
    assert len(parts) == 3 and len({part.rsplit("run-", 1)[1] for part in parts}) == 1


def test_without_the_package(monkeypatch, capsys):
    """One line that says what to install, before anything is trained."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = run(train.main, ["tales", *TINY, "--track", "wandb"], monkeypatch, capsys)
    assert code == 2 and "pip install wandb" in err and err.count("\n") == 1
    assert not os.path.exists("artifacts/logs"), "the next run has its name"
    code, _, err = run(train.main, ["tales", *TINY, "--track", "tensorbord"], monkeypatch, capsys)
    assert code == 2 and "did you mean tensorboard" in err


@pytest.mark.parametrize("closes", (True, False))
def test_a_tracker_that_fails_does_not_stop_the_run(closes, monkeypatch, capsys):
    """While it logs, or when it is closed."""

    def broken(cfg, identity, step):
        def log(*_):
            raise OSError("no space left")

        return "x", (lambda *_: None) if closes else log, log

    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", broken)
    code, out, err = run(
        train.main, ["tales", *TINY, "--track", "tensorboard"], monkeypatch, capsys
    )
    assert code == 0 and out.count("tensorboard no longer tracks this run: no space left") == 1
