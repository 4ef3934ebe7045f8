import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core, and so one thread for each, and what it starts
    os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

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
