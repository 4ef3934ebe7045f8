"""Importance sampling of times: more of those whose losses spread more, reweighted (Nichol &
Dhariwal, arXiv:2102.09672, section 3.3). A density (n,) is constant in each of n equal parts of [0,
1], and 1 in the mean; None stands for times that are drawn alike."""

from functools import partial

import torch
import torch.nn.functional as F

from utils import draws
from utils.corruption import loss_per_pass

BINS = 16
EVERY, ROWS = 100, 256  # steps between measurements, and training rows of each


def cdf(t, density):
    """Share of times that the density has below t, in t's shape."""
    if density is None:
        return t
    n = len(density)
    below = F.pad(density.cumsum(0), (1, 0)) / n
    part = (t * n).floor().long().clamp(0, n - 1)
    return below[part] + (t - part / n) * density[part]


def inverse_cdf(u, density):
    """Times in [0, 1] of the density, from uniforms u."""
    if density is None:
        return u
    n = len(density)
    below = F.pad(density.cumsum(0), (1, 0)) / n
    part = (torch.searchsorted(below, u, right=True) - 1).clamp(0, n - 1)
    return (part / n + (u - below[part]) / density[part]).clamp(0, 1)


def density_at(t, density):
    """The density at times t in [0, 1], in t's shape."""
    if density is None:
        return torch.ones_like(t)
    return density[(t * len(density)).long().clamp(max=len(density) - 1)]


@torch.no_grad()
def time_density(family, model, x0):
    """Density of times (BINS,), in proportion to the root mean square of the rows' weighted losses
    at each, for x0 (R, L) long. Half of it is uniform, so that no weight is above 2."""
    R, whole = len(x0), family.corrupt(x0.shape, torch.Generator().manual_seed(0))
    loss, rows_at_once = partial(family.loss, model), family.cfg.rows_at_once
    losses = loss_per_pass(loss, x0, [whole], rows_at_once)[:, 0].double()
    bins = draws.stratum_of(R) * BINS // R
    squares = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, losses**2)
    spread = (squares / torch.bincount(bins, minlength=BINS).clamp(min=1)).sqrt()
    return 0.5 + 0.5 * spread / spread.mean().clamp(min=1e-12)


def is_due(cfg, step):
    """Whether the density is measured before this step."""
    return cfg.time_sampling == "importance" and step > 0 and step % EVERY == 0


def measure(run, step):
    """`time_density` of coming training rows of a run, the same in all processes."""
    hardware, batches = run.hardware, -(-ROWS // run.cfg.batch_size)
    rows = torch.cat([run.data.batch(step + i, slice(None)) for i in range(batches)])[:ROWS]
    run.model.eval()
    with hardware.autocast():
        rows = rows.to(hardware.device)
        density = time_density(run.family, run.model, rows)
    run.model.train()
    return torch.tensor(hardware.agree(density.tolist()), dtype=density.dtype)
