"""Training at scale and in trouble: micro-batches, several processes, shards, kills, full disks,
exact resuming."""

import dataclasses
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import toy
from conftest import ROOT, SIZES, break_loss, interrupt, resumed

import config
import train
from config import Config
from model import Transformer
from scripts import data as data_script
from utils import (
    checkpoint,
    cli,
    corpus,
    encoding,
    importance,
    metrics,
    optim,
    plots,
    ranks,
    runs,
    runtime,
    shards,
    tales,
    texts,
    tokenizer,
)
from utils.cli import UserError
from utils.families import family_of
from utils.settings import family_defaults

CPU = ranks.Hardware(torch.device("cpu"))
UNIFORM = family_defaults("uniform") | {"objective": "uniform"}
CANVAS = config.CANVAS | {"block_len": 6}
TINY = SIZES | dict(
    data="tales",
    rows="document",
    vocab_size=1024,
    seq_len=67,
    tie_embeddings=True,
    dtype="float32",
    name="tiny",
)


def tiny(**changes):
    return cli.merge(Config, TINY, changes)


def weights(name, part="model"):
    return checkpoint.read(f"artifacts/models/{name}.pt")[part]


def assert_close(a, b, tolerance):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=tolerance, rtol=0)


# --- the batch, whoever computes it ---------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"complementary": True, "optimizer": "adamw"},
        {"loss_weighting": "pooled"},
        {"corruption": "bernoulli", "rows": "stream", "seq_len": 32},
        {"block_len": 11},
        {"objective": "ar"},
        UNIFORM,
    ),
)
def test_micro_batches_are_the_batch(changes):
    """Ten steps in fp32: two rows at a time, or all at once. With the sum of gradients instead of
    the mean, or other masks, the weights would differ by their own size."""
    for name, micro_batch in (("whole", 0), ("parts", 2)):
        train.train(
            tiny(
                name=name,
                micro_batch=micro_batch,
                max_iters=10,
                eval_interval=10,
                short_rows=0.2,
                **changes,
            ),
            quiet=True,
        )
    assert_close(weights("whole"), weights("parts"), 1e-5)


def test_pieces_that_do_not_fit_are_refused(monkeypatch):
    with pytest.raises(UserError, match="be even, since complementary rows are pairs"):
        tiny(complementary=True, micro_batch=1)
    monkeypatch.setattr(ranks, "start", lambda *_: CPU._replace(world=2))
    with pytest.raises(UserError, match="cannot be shared among 2 processes in pieces of 4 rows"):
        train.train(tiny(micro_batch=4), quiet=True)


def test_ranks_share_the_batch():
    """Two halves are the whole, and pairs of complementary rows are not torn apart."""
    for changes in (
        {},
        {"complementary": True},
        {"rows": "stream", "corruption": "bernoulli"},
        {"block_len": 6},
        UNIFORM,
        CANVAS,
    ):
        cfg = tiny(batch_size=8, **changes)
        data = corpus.load(cfg)
        family = family_of(cfg)
        (whole,), seed, rows = train.draw_batch(family, data, 3, CPU)
        assert rows == 8
        halves = [
            train.draw_batch(family, data, 3, CPU._replace(rank=rank, world=2)) for rank in (0, 1)
        ]
        for part in (
            lambda piece: piece[0],
            lambda piece: piece[1].masked,
            lambda piece: piece[1].weight,
            *[lambda piece: piece[1].noise, lambda piece: piece[1].level]
            * ("objective" in changes),
            *[lambda piece: piece[1].conditioned] * (changes == CANVAS),
        ):
            assert torch.equal(part(whole), torch.cat([part(half.pieces[0]) for half in halves]))
        assert len({seed, halves[1].seed}) == 2, "dropout differs"


@pytest.mark.parametrize(
    "B, L, given, size, changes",
    (
        (64, 256, 0, 64, {}),
        (64, 256, 0, 16, {}),
        (48, 67, 1, 48, {}),
        (6, 10, 0, 2, {"schedule": "cos"}),
        (64, 256, 0, 16, {"complementary": True}),
        (8, 5, 0, 2, {"complementary": True}),
        (2, 3, 0, 2, {"complementary": True}),
        (16, 64, 0, 4, {"block_len": 16}),
        (16, 65, 1, 16, {"block_len": 4}),
        (8, 16, 0, 8, {"block_len": 1}),
    ),
)
def test_a_layout_has_a_static_bound(B, L, given, size, changes):
    """All pieces of a batch have an index of one length at every step; it lists the masked
    positions, then -1; and it is hardly longer than needed."""
    cfg = toy.settings(**{"seq_len": L, "rows": "document" if given else "stream"} | changes)
    complementary, n = cfg.complementary, cfg.block_len or L - given
    units = B * (L - given) // n
    lengths, most = set(), 0
    for step in range(200):
        whole = family_of(cfg).corrupt((B, L), runtime.generator(step))
        pieces = whole.split(slice(0, B), size)
        lengths |= {len(piece.index) for piece in pieces}
        for number, piece in enumerate(pieces):
            masked = whole.masked[number * size : (number + 1) * size]
            assert torch.equal(piece.index[piece.index >= 0], masked.flatten().nonzero()[:, 0])
            assert torch.equal(piece.masked, masked)
        most = max(most, *((piece.index >= 0).sum().item() for piece in pieces))
    (length,) = lengths
    assert most > length - size * (L - given) // n - (L if complementary else 0), (
        "the bound is tight"
    )
    assert (
        length <= units + math.ceil(n * (units + 1) / 2)
        or size < B
        or cfg.schedule != "linear"
        or complementary
    ), "maths.md"


def test_an_index_filled_up_changes_no_loss():
    model, x0 = toy.Lookup(blur=0.2), toy.SEQUENCES[:8]
    whole = family_of(toy.settings()).corrupt((8, 4), runtime.generator(1))
    (piece,) = whole.split(slice(0, 8), 8)
    assert (piece.index == -1).any()
    torch.testing.assert_close(
        toy.MASKED.weighted_ce(model, x0, piece), toy.MASKED.weighted_ce(model, x0, whole)
    )


def test_complementary_masks():
    """Each token of a pair's text is masked in one row or the other (both, if a row has all
    masked); the number of masks stays uniform, so that the loss stays the bound (test_maths.py)."""
    cfg, counts = toy.settings(complementary=True), []
    for step in range(400):
        masked, weight, *_ = family_of(cfg).corrupt((8, 4), runtime.generator(step))
        first, second = masked[::2], masked[1::2]
        assert (first | second).all() and ((first & second).any(1) == first.all(1)).all()
        assert torch.equal(weight, 4 / masked.sum(1))
        counts += masked.sum(1).tolist()
    assert [counts.count(n) / len(counts) for n in range(1, 5)] == pytest.approx(
        [0.25] * 4, abs=0.02
    )


def test_softcap_bounds_the_logits_and_keeps_their_order():
    torch.manual_seed(0)
    shape = dict(n_layer=1, n_head=1, n_embd=8, init="normal")
    plain, capped = (Transformer(toy.settings(softcap=cap, **shape), 12) for cap in (0.0, 5.0))
    plain.head.weight.data.mul_(100)
    capped.load_state_dict(plain.state_dict())
    ids = torch.randint(11, (2, 6))
    a, b = plain(ids), capped(ids)
    assert a.abs().max() > 5 > b.abs().max() and torch.equal(a.argsort(-1), b.argsort(-1))
    torch.testing.assert_close(b, 5 * torch.tanh(a / 5))


def test_activation_checkpointing_changes_nothing():
    for name, wanted in (("plain", False), ("again", True)):
        train.train(tiny(name=name, activation_checkpointing=wanted, dropout=0.1), quiet=True)
    assert_close(weights("plain"), weights("again"), 0)


def test_activation_checkpointing_computes_blocks_twice():
    calls = []
    for wanted in (False, True):
        model = Transformer(tiny(activation_checkpointing=wanted), 12).train()
        model.blocks[0].attn.register_forward_pre_hook(lambda *_: calls.append(wanted))
        model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    assert calls == [False, True, True]


# --- an average of the weights --------------------------------------------------------------------


def test_the_average_of_the_weights():
    """Warm start: the first step counts for 1 - 1/10, later ones for 1 - decay at least."""
    average, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    average.weight.data.fill_(0.0)
    expected = 0.0
    for step in range(200):
        model.weight.data.fill_(float(step))
        optim.update_average(average, model, 0.9, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.weight.item() == pytest.approx(expected) == pytest.approx(199 - 9, abs=0.1)


def test_what_is_judged_and_sampled_is_the_average():
    train.train(tiny(ema=0.9), quiet=True)
    state = checkpoint.read("artifacts/models/tiny.pt")
    best = checkpoint.read("artifacts/models/tiny.best.pt")
    assert best["step"] == 6 and all(
        torch.equal(best["model"][key], state["ema"][key]) for key in best["model"]
    )
    assert not torch.equal(
        state["ema"]["blocks.0.mlp.fc.weight"], state["model"]["blocks.0.mlp.fc.weight"]
    )
    model, _, _ = checkpoint.restore(state, torch.device("cpu"))
    assert torch.equal(model.blocks[0].mlp.fc.weight, state["ema"]["blocks.0.mlp.fc.weight"])


# --- never losing a step --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    (
        {"ema": 0.9},
        {"complementary": True, "micro_batch": 2},
        {"optimizer": "adamw", "ema": 0.95},
        {"weight_decay": 0.1, "softcap": 15.0, "rope_base": 1000.0},
        {"time_sampling": "importance"},
        UNIFORM,
        {"objective": "ar"},
        {"block_len": 6},
        CANVAS,
    ),
)
def test_resuming_is_exact(changes, monkeypatch):
    """Any number of stops: weights, optimizer state, average, log and best-so-far are those of a
    run in one go."""
    whole = tiny(name="whole", dropout=0.1, short_rows=0.5, save_interval=1, **changes)
    monkeypatch.setattr(importance, "EVERY", 2)
    train.train(whole, quiet=True)
    cfg, state, stops = dataclasses.replace(whole, name="parts"), None, [2, 3, 5]
    save = checkpoint.save

    class Crash(Exception):
        pass

    def save_and_crash(path, data):
        save(path, data)
        if path.endswith("parts.pt") and stops and data["step"] >= stops[0]:
            stops.pop(0)
            raise Crash

    monkeypatch.setattr(checkpoint, "save", save_and_crash)
    while True:
        try:
            train.train(cfg, state, quiet=True)
            break
        except Crash:
            cfg, state = resumed(["--resume", "artifacts/models/parts.pt"])
    a, b = (checkpoint.read(f"artifacts/models/{name}.pt") for name in ("whole", "parts"))
    assert_close(a["model"], b["model"], 0)
    if whole.ema:
        assert_close(a["ema"], b["ema"], 0)
    for one, other in zip(a["optimizers"], b["optimizers"]):
        for number, values in one["state"].items():
            assert_close(
                {k: torch.as_tensor(v) for k, v in values.items()},
                {k: torch.as_tensor(v) for k, v in other["state"][number].items()},
                0,
            )
    assert a["nll"] == b["nll"] and torch.equal(a["running"], b["running"])
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k != "minutes"}
            for line in open(f"artifacts/logs/{name}.jsonl")
        ]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    best, other = (
        checkpoint.read(f"artifacts/models/{name}.best.pt") for name in ("whole", "parts")
    )
    assert best["step"] == other["step"] and best["nll"] == other["nll"]
    assert_close(best["model"], other["model"], 0)


def test_a_stop_between_evaluations_leaves_no_trace(monkeypatch):
    """Ctrl-C after step 4 of 6, evaluations at 3 and 6: saved and not evaluated, so that log and
    best stay the same."""
    whole = tiny(name="whole")
    train.train(whole, quiet=True)
    interrupt(monkeypatch, 3, signal.SIGTERM)
    train.train(dataclasses.replace(whole, name="parts"))
    assert checkpoint.read("artifacts/models/parts.pt")["step"] == 4
    assert [json.loads(line)["step"] for line in open("artifacts/logs/parts.jsonl")] == [3]
    train.train(*resumed(["--resume", "artifacts/models/parts.pt"]), quiet=True)
    assert_close(weights("whole"), weights("parts"), 0)
    one, two = (
        [json.loads(line) | {"minutes": 0} for line in open(f"artifacts/logs/{name}.jsonl")]
        for name in ("whole", "parts")
    )
    assert one == two


@pytest.mark.parametrize("stop, begin", ((1, 0), (3, 1)))
def test_a_stopped_run_that_ends_where_it_stopped_is_judged(stop, begin, monkeypatch):
    """Ctrl-C between evaluations, and no step is left to do: these steps get their evaluation, also
    if it is the first."""
    interrupt(monkeypatch, stop, signal.SIGINT)
    train.train(tiny(eval_interval=3))
    assert len(open("artifacts/logs/tiny.jsonl").readlines()) == begin
    cfg, state = resumed(["--resume", "auto", "--max_iters", str(stop + 1)])
    report = train.train(cfg, state, quiet=True)
    last = json.loads(open("artifacts/logs/tiny.jsonl").readlines()[-1])
    assert report["steps"] == stop + 1 == last["step"] and math.isfinite(
        report["bound_nats_per_token"]
    )
    state = checkpoint.read("artifacts/models/tiny.pt")
    assert state["nll"] == last["bound"] and state["counted"] == 0


def test_a_checkpoint_from_before_goes_on():
    """Settings and entries that did not exist when it was written have their defaults."""
    train.train(tiny(), quiet=True)
    state = checkpoint.read("artifacts/models/tiny.pt")
    for name in ("ema", "micro_batch", "complementary", "softcap", "activation_checkpointing"):
        del state["config"][name]
    del state["corpus"], state["job"], state["ema"]
    checkpoint.save("artifacts/models/tiny.pt", state)
    cfg, state = resumed(
        ["--resume", "artifacts/models/tiny.pt", "--max_iters", "8", "--micro_batch", "2"]
    )
    assert train.train(cfg, state, quiet=True)["steps"] == 8
    assert (
        train.train(tiny(name="next", init_from="artifacts/models/tiny.best.pt"), quiet=True)[
            "steps"
        ]
        == 6
    )


def test_another_text_is_no_way_to_go_on(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question. " * 60)
    cfg = tiny(data="a.txt", rows="stream", tokenizer="char", seq_len=16, name="a")
    train.train(cfg, quiet=True)
    (tmp_path / "a.txt").write_text("to be or not to be, that is the squestion. " * 60)
    cfg, state = resumed(["--resume", "artifacts/models/a.pt", "--max_iters", "9"])
    with pytest.raises(UserError, match="a.txt is not the text that a was trained on"):
        train.train(cfg, state, quiet=True)


def forkserver():
    """Processes that start in milliseconds: forked from one that has imported torch and this
    project, and no more."""
    if os.name == "nt":
        pytest.skip("needs fork and kill -9")
    os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, os.path.join(ROOT, "tests")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "train", "test_train"])
    return context


def save_for_ever(path):
    step = checkpoint.read(path)["step"] if os.path.exists(path) else 0
    while True:
        step += 1
        checkpoint.save(
            path,
            {
                "version": config.VERSION,
                "config": {},
                "sample": {},
                "tokenizer": "",
                "step": step,
                "nll": 1.0,
                "model": {"x": torch.full((300_000,), float(step))},
            },
        )


def test_a_kill_at_any_moment_leaves_a_checkpoint(tmp_path):
    """24 kills at random moments, most of them inside a save: what is there is whole, and no older
    than the last save that had ended."""
    path, dice, steps, unfinished = str(tmp_path / "x.pt"), random.Random(0), [0], 0
    for _ in range(24):
        child = forkserver().Process(target=save_for_ever, args=(path,))
        child.start()
        deadline = time.time() + 30
        while (checkpoint.read(path)["step"] if os.path.exists(path) else 0) <= steps[
            -1
        ] and time.time() < deadline:
            time.sleep(0.002)
        seen = checkpoint.read(path)["step"]
        time.sleep(dice.random() * 0.02)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        unfinished += os.path.exists(f"{path}.tmp")
        state = checkpoint.read(path)
        assert (state["model"]["x"] == state["step"]).all() and len(state["model"]["x"]) == 300_000
        assert state["step"] >= seen > steps[-1]
        steps.append(state["step"])
    assert unfinished > 3, "some kills hit a save"


def test_a_run_that_is_killed_again_and_again(tmp_path):
    """kill -9 at three random moments of a run that saves at every step; what it ends with is what
    it would have been."""
    long = dict(max_iters=60, eval_interval=20, save_interval=1)
    train.train(tiny(name="whole", **long), quiet=True)
    dice = random.Random(1)
    path = "artifacts/models/parts.pt"
    cfg = tiny(name="parts", **long)
    state = None
    for kill in range(3):
        child = forkserver().Process(target=train.train, args=(cfg, state, True))
        child.start()
        before, deadline = state["step"] if state else 0, time.time() + 60
        while (
            checkpoint.read(path)["step"] if os.path.exists(path) else 0
        ) < before + 3 and time.time() < deadline:
            time.sleep(0.005)
        time.sleep(dice.random() * 0.05)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        cfg, state = resumed(["--resume", path])
        assert before < state["step"] < 60
    train.train(cfg, state, quiet=True)
    assert_close(weights("whole"), weights("parts"), 0)
    assert [json.loads(line)["step"] for line in open("artifacts/logs/parts.jsonl")] == [20, 40, 60]


def test_a_full_disk_leaves_the_last_checkpoint(monkeypatch):
    """Files may not grow beyond 100 kB after step 3: the checkpoint (200 kB) cannot be written;
    then not even the log."""
    resource = pytest.importorskip("resource", reason="Windows has no such limits")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    draw = train.draw_batch

    def fill_the_disk(family, data, step, *rest):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        return draw(family, data, step, *rest)

    monkeypatch.setattr(train, "draw_batch", fill_the_disk)
    for name, size, what in (("a", 100_000, "models/a"), ("b", 10, "logs/b.jsonl")):
        try:
            with pytest.raises(UserError, match=f"cannot write .*{what}"):
                train.train(tiny(name=name), quiet=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert checkpoint.read(f"artifacts/models/{name}.pt")["step"] == 3
        assert not [file for file in os.listdir("artifacts/models") if file.endswith(".tmp")]


def test_a_broken_loss_stops_the_run(monkeypatch):
    """At once where reading the loss costs nothing (a GPU's is read at every tenth step)."""
    break_loss(monkeypatch, 12, math.nan)
    with pytest.raises(UserError, match="not finite at step 13; nothing was saved"):
        train.train(tiny(max_iters=100, eval_interval=100), quiet=True)


def test_a_crash_in_the_final_metrics_loses_nothing(monkeypatch):
    """The run is finished, but its last lines were never written: going on with it writes them."""

    def crash(*_):
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "held_out", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train.train(tiny(), quiet=True)
    before = weights("tiny")
    report = train.train(*resumed(["--resume", "auto"]), quiet=True)
    assert report["steps"] == 6 and os.path.exists("artifacts/logs/tiny.json")
    assert_close(before, weights("tiny"), 0)
    with pytest.raises(UserError, match="is finished"):
        resumed(["--resume", "auto"])
    # and again at the end of a longer run, whose last metrics are of the shorter
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "held_out", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train.train(*resumed(["--resume", "auto", "--max_iters", "8"]), quiet=True)
    assert train.train(*resumed(["--resume", "auto"]), quiet=True)["steps"] == 8


@pytest.mark.parametrize("of_last", (4.0, 6.0, math.nan))
def test_the_best_is_found_anew_at_the_end(of_last, monkeypatch):
    """One mask a row finds step 3 the best of 3 and 6; all of them may find that it is the last. A
    resumed run has to be better than what was found."""
    nlls, finals = [1.0, 2.0, 1.5], [5.0, of_last, 3.0, 8.0]
    monkeypatch.setattr(metrics, "mean_and_errors", lambda nll: (nlls.pop(0), 0.1, 0.1))
    monkeypatch.setattr(metrics, "held_out", lambda *_: {"bound_nats_per_token": finals.pop(0)})
    report = train.train(tiny(ema=0.9), quiet=True)
    last = of_last < 5
    assert (
        report["best_step"]
        == (6 if last else 3)
        == checkpoint.read("artifacts/models/tiny.best.pt")["step"]
    )
    if last:
        assert_close(weights("tiny.best"), weights("tiny", "ema"), 0)
    report = train.train(*resumed(["--resume", "auto", "--max_iters", "9"]), quiet=True)
    assert report["best_step"] == (9 if last else 3)


def test_no_matplotlib_is_no_crash(monkeypatch, capsys):
    def missing():
        raise ModuleNotFoundError("No module named 'matplotlib'")

    monkeypatch.setattr(plots, "pyplot", missing)
    monkeypatch.setattr(runs, "plots", plots)
    assert train.train(tiny())["steps"] == 6
    assert "no plots: No module named 'matplotlib'" in capsys.readouterr().out


def test_a_log_goes_on_after_a_line_without_its_end(tmp_path):
    path = str(tmp_path / "x.jsonl")
    with open(path, "w") as file:
        file.write('{"step": 1}\n{"step": 2}')
    runtime.begin_log(path, 2)
    runtime.write_line(path, {"step": 3})
    assert [json.loads(line)["step"] for line in open(path)] == [1, 2, 3]


def test_evaluations_take_no_more_rows_than_training(monkeypatch):
    """A micro_batch that fits into memory does so in evaluations too."""
    rows, forward = [], Transformer.forward

    def watched(self, ids, *args, **kwargs):
        rows.append(len(ids))
        return forward(self, ids, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", watched)
    train.train(tiny(micro_batch=2, eval_rows=8, final_rows=8), quiet=True)
    assert max(rows) == 2


def test_float16_steps_over_an_overflow(monkeypatch):
    """Gradients of step 3 that float16 cannot hold: no optimizer steps, the scale is halved, and
    the run goes on."""
    break_loss(monkeypatch, 3, 1e9)
    train.train(tiny(dtype="float16"), quiet=True)
    state = checkpoint.read("artifacts/models/tiny.pt")
    assert state["step"] == 6 and state["optimizers"][0]["state"][0]["step"] == 5
    assert state["scaler"]["scale"] == 2**15 and all(
        value.isfinite().all() for value in state["model"].values()
    )


# --- several processes ----------------------------------------------------------------------------

CRASH_ONCE = """
import os, sys
sys.path.insert(0, ROOT)
import train
from utils import cli
draw = train.draw_batch
def crash(family, data, step, hardware, *more):
    if step == 7 and hardware.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(1)
    return draw(family, data, step, hardware, *more)
train.draw_batch = crash
cli.run(train.main)
"""


def test_two_processes_are_one_and_survive_a_crash(tmp_path):
    """torchrun with two processes, one of which dies at step 7: it starts again from the checkpoint
    of step 5 by itself, under the same name, and ends with the weights of one process in one go."""
    changes = dict(
        max_iters=10, eval_interval=5, short_rows=0.2, micro_batch=1, ema=0.9, name="tiny"
    )
    train.train(tiny(**changes), quiet=True)
    os.rename("artifacts", "alone")
    (tmp_path / "tiny.py").write_text(f"config = {TINY | changes}")
    (tmp_path / "crash.py").write_text(CRASH_ONCE.replace("ROOT", repr(ROOT)))
    done = subprocess.run(
        [
            sys.executable,
            *(
                "-m torch.distributed.run --standalone --nproc_per_node=2 "
                "--max-restarts=1 crash.py tiny.py"
            ).split(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stdout + done.stderr and "resuming tiny at step 5" in done.stdout
    assert sorted(os.listdir("artifacts/models")) == ["tiny.best.pt", "tiny.pt"]
    a, b = (checkpoint.read(f"{folder}/models/tiny.pt") for folder in ("alone", "artifacts"))
    assert a["step"] == b["step"] == 10
    assert_close(a["model"], b["model"], 1e-5)
    assert_close(a["ema"], b["ema"], 1e-5)
    one, two = (
        [json.loads(line) for line in open(f"{folder}/logs/tiny.jsonl")]
        for folder in ("alone", "artifacts")
    )
    for x, y in zip(one, two, strict=True):
        assert x["step"] == y["step"]
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-5) and x["bound"] == pytest.approx(
            y["bound"], abs=1e-5
        )


@pytest.mark.parametrize(
    "rank, local, before, after", ((0, "0", 0, 2), (4, "0", 1, 1), (5, "1", 2, 0))
)
def test_a_first_process_that_fails_lets_the_others_go_on(rank, local, before, after, monkeypatch):
    """What one process cannot find the others cannot either, and say so, instead of waiting for it
    in vain."""
    calls = []
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(ranks.dist, "barrier", lambda: calls.append("barrier"))
    with pytest.raises(UserError), ranks.first_rank_first(CPU._replace(rank=rank, world=8)):
        assert len(calls) == before
        raise UserError("there is no corpus")
    assert len(calls) == before + after


def test_a_restart_finds_its_own_run(monkeypatch):
    """An earlier job of the same name is not gone on with, and over several nodes there is no
    guess."""
    for name, value in (("RUN_ID", "run1"), ("RESTART_COUNT", "0")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    train.train(tiny(), quiet=True)
    assert checkpoint.interrupted("artifacts", "tiny") == "", "nothing was restarted"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert checkpoint.interrupted("artifacts", "tiny") == os.path.join(
        "artifacts", "models", "tiny.pt"
    )
    # torchrun itself was started again, with the same --rdzv_id
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert checkpoint.interrupted("artifacts", "tiny") == ""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start them all again, with --resume auto"):
        checkpoint.interrupted("artifacts", "tiny")


# --- shards ---------------------------------------------------------------------------------------


@pytest.fixture
def stories(tmp_path, monkeypatch):
    """A .jsonl of 600 documents, a tokenizer, and shards of 5,000 tokens."""
    documents = tales.generate("shards", 600)
    with open("s.jsonl", "w") as file:
        file.writelines(json.dumps({"body": text}) + "\n" for text in documents)
    text = tokenizer.train_bpe(documents[:200], 512)
    tokenizer.save(text, "t.json")
    monkeypatch.setattr(shards, "SHARD_TOKENS", 5000)
    monkeypatch.setattr(encoding, "PIECE", 6000)
    monkeypatch.setattr(shards, "SHARD_HELD_OUT", 0.05)
    return documents, text


def make_shards(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data.py", *words.split()])
    data_script.main(sys.argv[1:])


COMMAND = "--dataset s.jsonl --text-column body --tokens 1B --tokenizer t.json --output "


def test_shards_hold_every_document_once(stories, monkeypatch, capsys):
    documents, text = stories
    make_shards(COMMAND + "s.bin", monkeypatch)
    assert "600 documents" in capsys.readouterr().out
    index = shards.read_index("s.bin")
    assert len(index["shards"]) > 5 and index["dtype"] == "uint16" and index["ended"]
    found = {"train": [], "held_out": []}
    for part, here in found.items():
        for shard in index["shards"]:
            ids = torch.from_file(
                f"s.bin/{part}_{shard['name']}", dtype=torch.int16, size=shard[part]
            ).tolist()
            here += split_at(ids, text)
    assert sorted(found["train"] + found["held_out"]) == sorted(documents)
    assert found["held_out"] == [d for d in documents if texts.is_held_out(d, 0.05)] != []
    assert index["tokens"] == sum(shard["train"] for shard in index["shards"])


def split_at(ids, text):
    documents, here = [], []
    for i in ids:
        if i == text.end:
            documents.append(text.decode(here))
            here = []
        else:
            here.append(i)
    assert not here
    return documents


def test_a_full_disk_loses_no_shard(stories, monkeypatch):
    """One line that says so, and what is whole is kept."""
    full, count = os.fsync, iter(range(10**6))

    def fsync(descriptor):
        if next(count) > 20:
            raise OSError(28, "No space left on device")
        full(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(
            UserError, match="No space left on device.*goes on from the last whole shard"
        ):
            make_shards(COMMAND + "parts.bin", patch)
    assert (
        0 < len(shards.read_index("parts.bin")["shards"])
        and not shards.read_index("parts.bin")["ended"]
    )
    for folder in ("parts.bin", "whole.bin"):
        make_shards(COMMAND + folder, monkeypatch)
    whole, parts = (shards.read_index(folder) for folder in ("whole.bin", "parts.bin"))
    assert (
        whole["shards"] == parts["shards"] and whole["tokens"] == parts["tokens"] and parts["ended"]
    )


def test_shards_go_on_after_an_interruption(stories, monkeypatch, capsys):
    """Stopped in the middle of the third shard, and asked for more later: the same files as in one
    go."""
    make_shards(COMMAND + "whole.bin", monkeypatch)
    documents_of = texts.documents_of

    def stops(dataset, *rest):
        for number, document in enumerate(documents_of(dataset, *rest)):
            if number == 210:
                raise KeyboardInterrupt
            yield document

    monkeypatch.setattr(texts, "documents_of", stops)
    with pytest.raises(KeyboardInterrupt):
        make_shards(COMMAND + "parts.bin", monkeypatch)
    done = shards.read_index("parts.bin")
    assert 1 <= len(done["shards"]) < 4 and done["documents"] < 210
    monkeypatch.setattr(texts, "documents_of", documents_of)
    make_shards(COMMAND + "parts.bin", monkeypatch)
    whole, parts = (shards.read_index(folder) for folder in ("whole.bin", "parts.bin"))
    assert whole["shards"] == parts["shards"] and whole["documents"] == parts["documents"] == 600
    for shard in whole["shards"]:
        for part in ("train", "held_out"):
            assert (
                open(f"whole.bin/{part}_{shard['name']}", "rb").read()
                == open(f"parts.bin/{part}_{shard['name']}", "rb").read()
            )
    with pytest.raises(UserError, match="was made with text_column=body, not text"):
        make_shards(COMMAND.replace("body", "text") + "parts.bin", monkeypatch)


def write_and_measure(pipe):
    """Shards from two .jsonl, in a process of its own; sends by how many kB the second one made its
    peak memory grow."""
    import resource

    for name in ("some", "many"):  # the first also pays for imports, threads and buffers
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        data_script.main(f"--dataset {name}.jsonl {WRITE} {name}.bin".split())
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


WRITE = "--text-column body --tokens 1B --tokenizer t.json --output"


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="other systems tell less")
def test_peak_memory_is_that_of_the_process_itself():
    """Not of the one that started it, whose memory a system may count."""
    child = (
        "from utils import runtime; import torch; print(runtime.peak_memory(torch.device('cpu')))"
    )
    parent = (
        "import subprocess, sys; block = bytearray(900_000_000); block[::4096] = b'x' * "
        "len(block[::4096]); del block; print(subprocess.run([sys.executable, '-c', sys.argv[1]], "
        "stdout=subprocess.PIPE, check=True).stdout.decode())"
    )
    words = [sys.executable, "-c", parent, child]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 50e6 < int(done.stdout) < 7e8


def test_shards_are_written_in_flat_memory(stories):
    """70,000 documents more, 20 MB, make the whole process grow by hardly more than what `datasets`
    and the tokenizer keep for themselves (26 MB), through the same calls as those for the hub."""
    documents, _ = stories
    for name, count in (("some", 50_000), ("many", 120_000)):
        with open(f"{name}.jsonl", "w") as file:
            file.writelines(
                json.dumps({"body": documents[i % len(documents)] + str(i)}) + "\n"
                for i in range(count)
            )
    here, there = forkserver().Pipe()
    child = forkserver().Process(target=write_and_measure, args=(there,))
    child.start()
    there.close()
    assert here.recv() < 38_000, "with all texts in memory it would be 46,000 at least"
    child.join()


def test_training_on_shards(stories, monkeypatch):
    make_shards(COMMAND + "s.bin", monkeypatch)
    documents, text = stories
    cfg = tiny(data="s.bin", rows="stream", seq_len=32, batch_size=8)
    data = corpus.load(cfg)
    assert (
        data.tokenizer.to_json() == text.to_json()
        and data.tokens == shards.read_index("s.bin")["tokens"]
    )
    known = "".join(t + "|" for t in documents if not texts.is_held_out(t, 0.05))
    for row in data.batch(0).tolist():
        assert "".join("|" if i == text.end else text.decode([i]) for i in row) in known
    assert torch.equal(data.batch(5)[2:6], data.batch(5, slice(2, 6)))
    report = train.train(cfg, quiet=True)
    assert report["bound_bits_per_byte"] > 0
    with pytest.raises(UserError, match="shards are a stream"):
        corpus.load(tiny(data="s.bin"))


@pytest.mark.parametrize(
    "words, message",
    (
        ("--dataset s.jsonl --tokens 1B --output s.bin", "needs --tokenizer"),
        (
            "--dataset s.jsonl --tokens many --tokenizer t.json --output s.bin",
            "expected a number of tokens",
        ),
        ("--dataset s.jsonl --tokens 1B --tokenizer t.json --output s.txt", "something.bin"),
        ("--dataset tales --tokens 1B --tokenizer t.json --output s.bin", "fit into memory"),
        ("--dataset s.jsonl --tokens 1B --tokenizer t.json --output s.bin", "has no column text"),
        ("--dataset none.jsonl --tokens 1B --tokenizer t.json --output s.bin", "there is no file"),
    ),
)
def test_mistakes_with_shards(words, message, stories, monkeypatch):
    with pytest.raises(UserError, match=message):
        make_shards(words, monkeypatch)


def test_a_shard_that_was_cut_off_is_named(stories, monkeypatch):
    make_shards(COMMAND + "s.bin", monkeypatch)
    os.truncate("s.bin/train_00001.bin", 100)
    with pytest.raises(UserError, match="train_00001.bin has 100 bytes"):
        corpus.load(tiny(data="s.bin", rows="stream", seq_len=32))


def test_a_folder_is_no_corpus(tmp_path):
    (tmp_path / "folder").mkdir()
    for path, message in (("folder", "holds no shards"), ("data/fineweb_edu.bin", "make it with")):
        with pytest.raises(UserError, match=message):
            corpus.load(tiny(data=path, rows="stream"))


def test_long_documents_are_cut_where_bpe_does_not_join(monkeypatch):
    text = tokenizer.train_bpe(tales.generate("cut", 300), 400)
    document = "  ".join(tales.generate("long", 30)) + "\n\n x"
    whole = text.encode([document])[0]
    monkeypatch.setattr(encoding, "PIECE", 50)
    assert len(list(encoding.cut(document))) > 20 and "".join(encoding.cut(document)) == document
    assert encoding.token_stream([document], text).tolist() == [text.end, *whole, text.end]
    assert "".join(encoding.cut("x" * 1000)) == "x" * 1000, "and where there is no space, anywhere"
