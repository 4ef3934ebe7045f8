"""Random draws, each a pure function of what it is given: strata, masks, tokens, and a row's own
uniforms."""

import math
from functools import lru_cache, partial

import torch
import torch.nn.functional as F


def at_least_float32(values):
    """bfloat16 as float32, for softmax and losses say; float32 and float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def stratified(n, generator):
    """n uniforms in [0, 1), (n,) float64, one in each stratum [i/n, (i+1)/n), with one random
    offset for all.

    Together they cover [0, 1) evenly (variational diffusion models, arXiv:2107.00630). Row r takes
    the r-th stratum in bit-reversed (van der Corput) order, so that every contiguous slice of the
    rows, a micro-batch or a rank's share, is spread evenly too. Which row takes which never
    changes: what stands in the rows must be in random order.
    """
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    return (stratum_of(n) + offset) / n


def shuffled(u, generator):
    """The uniforms u (B, K) of each row in random order: it has K strata of its own."""
    return u.gather(1, torch.rand(u.shape, generator=generator).argsort(1))


@lru_cache(maxsize=32)
def stratum_of(n):
    """Which of n strata each of n rows takes, (n,) long."""
    width = max(1, (n - 1).bit_length())
    return torch.tensor([int(f"{row:0{width}b}"[::-1], 2) for row in range(n)]).argsort().argsort()


def position_uniforms(B, n, generator, maskable=None):
    """(uniforms (B, n), infinite where not maskable (B, n) bool; how many of each row are, n or
    (B,), at least 1)"""
    u = torch.rand(B, n, generator=generator)
    if maskable is None:
        return u, n
    return u.masked_fill(~maskable, math.inf), maskable.sum(1).clamp(min=1)


def first_of(u, counts):
    """Where the counts (B,) least of each row of u (B, n) are, no infinite one: (B, n) bool."""
    order = u.argsort(1)
    least = torch.arange(order.size(1)) < counts[:, None]
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, least) & u.isfinite()


def truncate(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Token distribution (N, V) to draw from: temperature, then top-k (0 = all), then top-p (1 =
    all).

    top-p keeps the likeliest tokens until their sum reaches top_p, the one that crosses it
    included. Temperature 0 is all mass on the likeliest token; it may be one for each, (N, 1),
    above 0.
    """
    if not torch.is_tensor(temperature) and temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        sorted_p, order = p.sort(descending=True)
        dropped = sorted_p.cumsum(-1) - sorted_p >= top_p
        p = p.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), 0.0)
    return p


def draw(p, u):
    """Tokens (N,) from p (N, V), which need not be normalised, by inverting the cumulative sum at u
    (N,) in [0, 1).

    In float64: float32 never draws a token below about 1e-8, which shifts the text's entropy
    (arXiv:2409.02908). A token of probability zero is never drawn. On MPS, which lacks float64,
    float32 does for vocabularies of some 4,000.
    """
    cumulative = p.to(u.dtype).cumsum(-1)
    return (cumulative <= u[:, None] * cumulative[:, -1:]).sum(-1).clamp(max=p.size(-1) - 1)


def _mix(x):
    """SplitMix64's finaliser on int64 tensors: a one-to-one scrambling of 64 bits (Steele et al.
    2014)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def row_uniforms(seeds, k, L, dtype=torch.float64):
    """Uniforms in [0, 1) of step k for rows with the integer seeds (B,): (2, B, L), on the seeds'
    device.

    A hash of (seed, step, which of the two, position): a row's numbers depend on its own seed
    alone, are the same on every device, and cost no loop over rows and no copy from the host.
    """
    which = torch.arange(2, device=seeds.device)[:, None, None]
    position = torch.arange(L, device=seeds.device)
    bits = _mix(_mix(_mix(_mix(seeds + 1)[None, :, None] + k) + which) + position)
    digits = 53 if dtype == torch.float64 else 24
    return ((bits >> (64 - digits)) & (2**digits - 1)).to(dtype) * 2.0**-digits


def precision_of(device):
    """The dtype in which to draw and to reckon times: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def uniforms_of(seeds, L, device):
    """`row_uniforms` as a function of the step, for rows with these integer seeds."""
    seeds = torch.tensor(list(seeds), device=device)
    return partial(row_uniforms, seeds, L=L, dtype=precision_of(device))
