import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

# a process for each core, and so one thread for each, and what it starts
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import functools  # noqa: E402
import signal  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

import config  # noqa: E402
import train  # noqa: E402
from utils import built_in, checkpoint, cli, runs, settings, tales, tokenizer  # noqa: E402

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session", autouse=True)
def made_once():
    """The corpus of tiny runs on tales, the same in all of them: stories and their BPE are made
    once. They took a run of six steps a third of its time."""
    generate, train_bpe = tales.generate, tokenizer.train_bpe
    stories = functools.lru_cache(maxsize=64)(lambda seed, n: tuple(generate(seed, n)))
    tokenizers = functools.lru_cache(maxsize=64)(lambda sample, *size: train_bpe(sample, *size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tales,
            "generate",
            lambda seed, n, grammar=tales.TALES: (
                list(stories(seed, n)) if grammar is tales.TALES else generate(seed, n, grammar)
            ),
        )
        patch.setattr(
            tokenizer,
            "train_bpe",
            functools.wraps(train_bpe)(lambda sample, *size: tokenizers(tuple(sample), *size)),
        )
        yield


# enough for tiny runs; encoding 2,048 takes as long as training. Children import this file too
built_in.HELD_OUT = 256


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch):
    """Tiny runs draw nothing, and show texts of a few steps: two figures and the texts took them
    longer than all else. `tales_run` in test_cli.py, which is made before, and the tests of plots
    do."""
    monkeypatch.setattr(train, "SHOWN_STEPS", 4)
    monkeypatch.setattr(
        runs,
        "plots",
        type(
            "NoPlots",
            (),
            {"loss_curves": staticmethod(lambda *_: None), "levels": staticmethod(lambda *_: None)},
        ),
    )


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Each test begins in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def break_loss(monkeypatch, step, factor):
    """Multiply the weights of the loss by factor (nan or infinity) in one step of training."""
    draw = train.draw_batch

    def broken(family, data, number, *more):
        batch, by = draw(family, data, number, *more), factor if number == step else 1
        pieces = [(x0, c._replace(weight=c.weight * by)) for x0, c in batch.pieces]
        return batch._replace(pieces=pieces)

    monkeypatch.setattr(train, "draw_batch", broken)


def interrupt(monkeypatch, step, number):
    """Let the process get signal `number` when training first asks for the batch of `step`, which
    must not be 0: the probes of speed ask for that."""
    from utils import corpus

    asked, load = [], corpus.load

    def loading(*args):
        data = load(*args)

        def batch(here, rows):
            asked.append(here)
            if here == step and asked.count(step) == 1:
                signal.raise_signal(number)
            return data.batch(here, rows)

        return data._replace(batch=batch)

    monkeypatch.setattr(corpus, "load", loading)


SIZES = dict(
    n_layer=1,
    n_head=2,
    n_embd=16,
    batch_size=4,
    max_iters=6,
    eval_interval=3,
    eval_rows=4,
    final_rows=4,
    final_masks=2,
    final_samples=0,
    compile="off",
    device="cpu",
)
TINY = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


def load(words):
    """(Config, what was chosen and why) of train.py's command line."""
    return settings.load(*cli.parse(words, config.Config))


def resumed(words):
    """(Config, checkpoint dict) of train.py's command line with --resume."""
    return checkpoint.resumed_config(*cli.parse(words, config.Config))


def run(main, words, monkeypatch, capsys):
    """(exit code, stdout, stderr) of a script's main with a command line (str or list)."""
    monkeypatch.setattr(
        sys, "argv", ["script", *(words.split() if isinstance(words, str) else words)]
    )
    code = 0
    try:
        cli.run(main)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err
