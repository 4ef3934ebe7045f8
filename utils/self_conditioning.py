"""Self-conditioning: a network is shown what it predicted before (Analog Bits, arXiv:2208.04202;
for tokens DiffusionGemma, arXiv:2608.00146, and Loopholed Discrete Diffusion, arXiv:2510.19304).

In training a share of the rows is predicted twice: in a first pass, without gradient, nothing is
shown, and in the second pass the prediction of the first, as a mean embedding that is added to the
input. In the bound all rows have both passes, so what is predicted is still a function of xt alone,
and it stays a bound: on -log p of a sampler that asks twice in each step. The sampling loop asks
once, and shows what was predicted in the step before.
"""

from fractions import Fraction

import torch


def drawn(cfg, B, generator):
    """Which of B rows get a first pass, (B,) bool; None without self-conditioning. As many in each
    group of neighbours, two for a share of a half, so that pieces of a batch are alike; which of
    them is chance, since neighbours have noise levels that are far apart."""
    if not cfg.self_conditioning:
        return None
    share = Fraction(cfg.self_conditioning).limit_denominator(16)
    groups = -(-B // share.denominator)
    order = torch.rand(groups, share.denominator, generator=generator).argsort(1)
    return (order < max(1, share.numerator)).flatten()[:B]


def ask(cfg, model, ids, level, where, earlier=None, **how):
    """Logits of the network for ids (B, W) at noise levels (B,) or (B, W); of one that is
    self-conditioned those of its second pass.

    where    (B, L) bool, L <= W: the positions whose prediction is shown
    earlier  (B, W, C), a prediction of before; or (B,) bool, the rows that get a first pass; None:
             all of them
    how      further arguments of `Transformer.forward`
    """
    if not cfg.self_conditioning:
        return model(ids, level, **how)
    if earlier is None or earlier.dtype == torch.bool:
        earlier = first_pass(model, ids, level, where, earlier, **how)
    return model(ids, level, prediction=earlier, **how)


@torch.no_grad()
def first_pass(model, ids, level, where, rows, select=None, **how):
    """The prediction (B, W, C) of the rows (B,) bool, None: all; 0 elsewhere."""
    (B, W), L, device = ids.shape, where.size(1), ids.device
    some = torch.arange(B, device=device) if rows is None else rows.nonzero()[:, 0]
    if not len(some):  # of a small piece of the batch
        embedding = next(model.parameters())
        return embedding.new_zeros(B, W, embedding.size(1))
    start, place = W * torch.arange(len(some), device=device), torch.arange(L, device=device)
    index = (start[:, None] + place).flatten()
    logits = model(ids[some], level[some], select=index, **how)
    found = model.mean_embedding(logits).view(len(some), L, -1)
    earlier = found.new_zeros(B, W, found.size(-1))
    earlier[some, :L] = found.masked_fill(~where[some][..., None], 0)
    return earlier


def shown(earlier, columns=None):
    """The argument (dict) of `Transformer.forward` for an earlier prediction (b, W, C), or None, at
    the columns (b, l); None: at all."""
    if earlier is not None and columns is not None:
        earlier = earlier.gather(1, columns[..., None].expand(-1, -1, earlier.size(-1)))
    return {} if earlier is None else {"prediction": earlier}


def memory(cfg, model, canvas):
    """The `Memory` of a canvas (B, L); None without self-conditioning."""
    return Memory(model, canvas) if cfg.self_conditioning else None


class Memory:
    """What the network predicted last of the positions of a canvas (B, L), as it is shown that: (B,
    L, C)."""

    def __init__(self, model, canvas):
        weight = model.earlier.weight
        self.model, self.kept = model, weight.new_zeros(*canvas.shape, len(weight))

    def read(self, rows, asked):
        """(b, L, C) of the rows (b,), 0 where nothing is asked (b, L)."""
        return self.kept[rows].masked_fill(~asked[..., None], 0)

    def write(self, rows, asked, logits):
        """Keep what logits (N, V) at the asked (b, L) positions of the rows (b,) predict."""
        found = self.model.mean_embedding(logits).to(self.kept.dtype)
        self.kept[rows] = self.kept[rows].masked_scatter(asked[..., None], found)
