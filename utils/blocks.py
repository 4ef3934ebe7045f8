"""Blocks: who sees whom in block diffusion (BD3-LM, arXiv:2503.09573), at which mask ratio."""

from functools import lru_cache

import torch

from utils.attention import tiles

TILE = 128  # tokens; with 64 a step took as long, and compiling it a third longer


def block_ids(L, block_len, bos, device):
    """Which block each of L positions is in, (L,) long: 0, 1, ..., and -1 for the `bos` first."""
    place = torch.arange(L, device=device) - bos
    return place.div(block_len, rounding_mode="floor").clamp(min=-1)


def mask_ratios(masked, block_len, bos):
    """Mask ratio of the block of each position of masked (B, L) bool: (B, L) float32, 0 for the
    `bos` first."""
    ids = block_ids(masked.size(1), block_len, bos, masked.device) + 1
    size = torch.bincount(ids, minlength=1)
    count = torch.zeros(len(masked), len(size), device=masked.device).index_add(
        1, ids, masked.float()
    )
    return (count / size.clamp(min=1))[:, ids]


@lru_cache(maxsize=8)
def doubled_mask(L, block_len, bos, device, causal=False):
    """Who looks at whom in training on [corrupted ; clean], (2L, 2L) bool, rows look at columns
    (section 3.1): corrupted tokens at their own corrupted block and the clean ones before it, clean
    tokens at their own clean block and those before it (causal: at what is to the left); nothing
    clean at anything corrupted."""
    ids = block_ids(L, block_len, bos, device)
    same, before = ids[:, None] == ids, ids[:, None] > ids
    corrupted = torch.cat((same, before), 1)
    seen = torch.ones_like(same).tril() if causal else same | before
    clean = torch.cat((torch.zeros_like(same), seen), 1)
    return torch.cat((corrupted, clean))


@lru_cache(maxsize=8)
def doubled_attention(L, block_len, bos, device, causal=False):
    """`doubled_mask`, on a CPU in tiles: half of it and more need not be computed."""
    mask = doubled_mask(L, block_len, bos, device, causal)
    return tiles(mask, TILE) if device.type == "cpu" else mask


def sight(asks, width, block_len, bos, start=None, begin=0):
    """Which of the first `width` positions those that ask, (b, l) long, look at while a text is
    generated: those of their own block and of the blocks to its left. (b, 1, l, width) bool.

    start  (b, 1), where the block that is denoised begins, if what is before it was read from left
           to right; begin: what comes before that is out of sight
    """
    place, asks = torch.arange(width, device=asks.device), asks[..., None]
    ids = block_ids(width, block_len, bos, asks.device)
    seen = ids <= ids[asks]
    if start is not None:
        seen = seen & ((place <= asks) | (asks >= start[..., None]))
    if begin:
        seen = seen & ((place >= begin) | (asks < begin))
    return seen[:, None]


def shifted(ids, mask):
    """ids (B, L) one to the right, MASK at the beginning: what an autoregressive network reads."""
    return torch.cat((torch.full_like(ids[:, :1], mask), ids[:, :-1]), 1)
