import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core, and so one thread for each, and what it starts
    os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

from utils import cli  # noqa: E402

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def interrupt(monkeypatch, step, number):
    """Let the process get signal `number` when training first asks for the batch of `step`, which must not be 0: the
    probes of speed ask for that."""
    from utils import corpus
    asked, load = [], corpus.load

    def loading(*args):
        data = load(*args)

        def batch(here, rows):
            asked.append(here)
            if here == step and asked.count(step) == 1:
                os.kill(os.getpid(), number)
            return data.batch(here, rows)
        return data._replace(batch=batch)
    monkeypatch.setattr(corpus, "load", loading)


TINY = ("--n_layer 1 --n_head 2 --n_embd 16 --batch_size 4 --max_iters 6 --eval_interval 3 --eval_rows 4 "
        "--final_rows 4 --final_masks 2 --final_samples 2 --compile off --device cpu").split()


def run(main, words, monkeypatch, capsys):
    """(exit code, stdout, stderr) of a script's main with a command line (str or list)."""
    monkeypatch.setattr(sys, "argv", ["script", *(words.split() if isinstance(words, str) else words)])
    code = 0
    try:
        cli.run(main)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err
