"""A distribution small enough to know everything about: 4 tokens of 3 kinds, a Markov chain, 81
sequences.

`Lookup` is a "network" that looks up exact conditionals; it goes through the same loss and sampler
code as the real one. All expected values of test_maths.py are exact properties of this
distribution.
"""

import dataclasses
import itertools

import torch

import diffusion
from config import Config, SampleConfig
from model import Transformer
from utils import families

L, V, MASK = 4, 3, 3
PI = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
A = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64)
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=L)))  # (81, 4)
P = PI[SEQUENCES[:, 0]] * torch.stack(
    [A[SEQUENCES[:, i], SEQUENCES[:, i + 1]] for i in range(L - 1)]
).prod(0)
CANVASES = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))  # (256, 4), MASKs included


def code(ids, base=V):
    """Row number of each sequence (N, 4) in SEQUENCES (or, with base 4, in CANVASES)."""
    return (ids * torch.tensor([base**i for i in reversed(range(L))])).sum(-1)


def conditionals():
    """p(x_i = v | visible tokens) for every canvas: (256, 4, 3)."""
    fits = ((CANVASES[:, None] == MASK) | (CANVASES[:, None] == SEQUENCES)).all(-1)  # (256, 81)
    mass = fits * P
    one_hot = torch.nn.functional.one_hot(SEQUENCES, V).double()  # (81, 4, 3)
    return torch.einsum("cs,siv->civ", mass, one_hot) / mass.sum(1)[:, None, None]


class Lookup:
    """The perfect network, or with blur > 0 an imperfect one: (1 - blur) p + blur / 3. Counts its
    calls."""

    vocab_size = V + 1

    def __init__(self, blur=0.0):
        self.logits = ((1 - blur) * conditionals() + blur / V).log()
        self.nfe, self.rows, self.levels = 0, 0, []

    def __call__(self, ids, noise_level=None, select=None):
        self.nfe, self.rows = self.nfe + 1, self.rows + len(ids)
        self.levels.append(noise_level)
        logits = self.logits[code(ids, V + 1)].clamp(min=-1e4)
        return logits if select is None else logits.flatten(0, 1)[select]


def empirical(rows):
    """Share of each of the 81 sequences among rows (N, 4)."""
    return torch.bincount(code(rows), minlength=81).double() / len(rows)


def total_variation(p, q):
    return 0.5 * (p - q).abs().sum().item()


def settings(**changes):
    """A Config with changes, unchecked (also of pairs that no run may have), whose loss is the
    bound."""
    assert changes.keys() <= {f.name for f in dataclasses.fields(Config)}
    cfg = object.__new__(Config)
    cfg.__dict__.update(dataclasses.asdict(Config()) | {"loss_weighting": "elbo"} | changes)
    return cfg


def family(**changes):
    """The family of a model of `settings`."""
    return families.family_of(settings(**changes))


def sample(model, canvas, *, window=None, stop=None, seeds=None, top=0, **changes):
    """`diffusion.sample` of a model of `settings`; changes are of them or of SampleConfig, whose
    top_p is 1 here."""
    names = {f.name for f in dataclasses.fields(SampleConfig)}
    how = SampleConfig(**{"top_p": 1.0} | {k: v for k, v in changes.items() if k in names})
    kind = family(**{k: v for k, v in changes.items() if k not in names})
    return diffusion.sample(
        kind, model, canvas, how, window=window, stop=stop, seeds=seeds, top=top
    )


def network(vocab_size, seed, dtype=torch.float32, **changes):
    """A small real network whose predictions depend on the whole canvas."""
    cfg = settings(**{"n_layer": 2, "n_head": 2, "n_embd": 16, "init": "normal"} | changes)
    torch.manual_seed(seed)
    model = Transformer(cfg, vocab_size).to(dtype).eval()
    for p in model.parameters():
        p.data.mul_(12)
    return model


MASKED = family()
