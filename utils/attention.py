"""Attention: softmax(q k^T / sqrt(D)) v, where queries may look at some of the keys; on a GPU by
PyTorch's kernels, on a CPU so that training is fast.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Tile(NamedTuple):
    """Some of the queries of a row of L, and all that they look at."""

    queries: tuple  # (start, end)
    keys: tuple  # of (start, end)
    mask: torch.Tensor  # (queries, keys) bool, True = may look


def tiles(mask, size):
    """mask (L, L) bool, True = row may look at column, as a tuple of `Tile`s of so many queries,
    without the tiles of as many keys that none of them looks at: they need not be computed."""
    L, found = len(mask), []
    for first in range(0, L, size):
        rows, keys = mask[first : first + size], []
        for start in range(0, L, size):
            end = min(start + size, L)
            if rows[:, start:end].any():
                if keys and keys[-1][1] == start:
                    start = keys.pop()[0]
                keys.append((start, end))
        looks = torch.cat([rows[:, start:end] for start, end in keys], 1)
        found.append(Tile((first, first + len(rows)), tuple(keys), looks))
    return tuple(found)


def parts(x, ranges):
    """x (B, H, L, D) from start to end of each of the ranges, one after the other."""
    found = [x[:, :, start:end] for start, end in ranges]
    return found[0] if len(found) == 1 else torch.cat(found, 2)


def attend(q, k, v, attention):
    """What queries q (B, H, l, D) read of keys k and values v (B, H, L, D): (B, H, l, D).

    attention  None (all look at all), "causal", a bool tensor (l, L) or (B, 1, l, L), True = query
               may look at key, or `tiles` of one (L, L)
    """
    if isinstance(attention, tuple):
        read = [
            attend(parts(q, [tile.queries]), *(parts(x, tile.keys) for x in (k, v)), tile.mask)
            for tile in attention
        ]
        return torch.cat(read, 2)
    mask = attention if torch.is_tensor(attention) else None
    # No dropout of attention weights: it rules out the fused kernels and made a training step
    # twice as slow.
    causal = attention == "causal" if mask is None else False
    fused = partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=causal)
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return fused(q, k, v)
    # training on a CPU, whose fused kernel is slow backwards in bfloat16
    L = k.size(2)
    if v.dtype == torch.bfloat16 and L <= 512:
        mask = torch.ones(L, L, dtype=torch.bool).tril() if causal else mask
        return ShortAttention.apply(q.to(v.dtype), k.to(v.dtype), v, mask)
    full = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        return fused(q.to(full), k.to(full), v.to(full))


class ShortAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v for q, k, v (B, H, L, D) by plain matrix products, for training on
    a CPU in bfloat16, whose fused kernel takes 6 times as long backwards; mask as
    F.scaled_dot_product_attention has it, or None.

    Queries and keys have size sqrt(D), so no score is above sqrt(D) and exp cannot overflow: the
    largest need not be subtracted. The weights are kept for the backward pass, (B, H, L, L), hence
    only for short rows. Backwards by hand: autograd would keep them in float32 too, and hand over
    the keys' gradient transposed, which is slow to go on with.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask):
        weight = ((q @ k.mT).float() * q.size(-1) ** -0.5).exp()
        weight = (weight if mask is None else weight * mask).to(v.dtype)
        total = weight.sum(-1, keepdim=True, dtype=torch.float32)
        y = ((weight @ v).float() / total).to(v.dtype)
        ctx.save_for_backward(q, k, v, weight, total, y)
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, weight, total, y = ctx.saved_tensors
        dy = dy.float() / total  # of weight @ v
        dscore = (dy.to(v.dtype) @ v.mT).float() - (dy * y).sum(-1, keepdim=True)
        dscore = (weight * dscore * q.size(-1) ** -0.5).to(v.dtype)
        return dscore @ k, dscore.mT @ q, weight.mT @ dy.to(v.dtype), None
