"""Rules of samplers: which positions get their token now, and which written ones are hidden again.

Pure functions of a `Moment`: they return the positions (b, L) to change, masked ones to write and written ones to hide
again. `SAMPLERS` in diffusion.py gives them their names. To add a sampler, write a rule here
and an entry there. Positions are chosen by the distribution p(x0 | xt) of a position, never by the probability of the
token that was drawn: that prefers likely tokens and collapses the entropy of the text (on the toy distribution of the
tests from 3.70 to 1.69 nats).
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Moment(NamedTuple):
    """What a rule sees: b rows of L positions. The counts are those of the block that is being written."""
    open: torch.Tensor        # (b, L) bool: masked, and may be written now
    written: torch.Tensor     # (b, L) bool: generated, and may be hidden again
    here: torch.Tensor        # (b, 1) masked share that the grid has now, from 1
    there: torch.Tensor       # (b, 1) masked share that the grid wants after this step, down to 0
    left: torch.Tensor        # (b, 1) steps left, this one included; at least 1
    u: torch.Tensor           # (b, L) uniforms of this step
    confidence: torch.Tensor  # (b, L) largest probability of the position, when it was last computed
    chosen: torch.Tensor      # (b, L) probability of the token, when it was written
    key: torch.Tensor         # (b, L) the sampler's key, higher goes first, -inf where not open; None for rules without
    value: float              # the sampler's number (NAME:VALUE)
    least: int                # tokens to write in a step, if there are so many


class Step(NamedTuple):
    """The state after a step; tensors on the model's device, the sampler's own: copy what you keep."""
    ids: torch.Tensor         # (B, L) long, MASK where still hidden
    masked: torch.Tensor      # (B, L) bool, still hidden
    fresh: torch.Tensor       # (B, L) bool, written in this step
    remasked: torch.Tensor    # (B, L) bool, hidden again in this step
    confidence: torch.Tensor  # (B, L) float32, of the distribution: when last computed; 1 for given tokens
    top: tuple                # (tokens (B, L, top) long, probabilities float32), when last computed; None if not asked
    evaluations: int          # network evaluations so far; one is a call of the network, whatever its rows
    row_evaluations: torch.Tensor  # (B,) long, in how many of them each row was; with guidance in two a step
    t: torch.Tensor           # (B,) masked share of what is to be written, from 1 to 0


# --- keys: p (N, V) -> (N,), higher goes first ------------------------------------------------------------------


def max_probability(p):
    """The largest probability."""
    return p.max(-1).values


def negative_entropy(p):
    """Minus the entropy, in nats."""
    return torch.special.entr(p).sum(-1).neg()


def margin(p):
    """How far the likeliest token is ahead of the second."""
    if p.size(-1) == 1:
        return p[:, 0]
    best, second = p.topk(2).values.unbind(-1)
    return best - second


# --- how many, and the best of a key ----------------------------------------------------------------------------


def due(now):
    """Tokens that have to be written in this step to keep up with the grid, (b, 1) long, at least one.

    Balanced: N masks in T <= N steps are N / T a step, rounded so that they sum to N. So no rule that writes as many
    takes more than T steps, whatever its data say.
    """
    masks = now.open.sum(1, keepdim=True)
    total = masks + now.written.sum(1, keepdim=True)
    return (masks - total + (total * (1 - now.there) + 1e-9).floor().long()).clamp(min=max(1, now.least))


def first(key, count):
    """The `count` (b, 1) positions of the highest key (b, L): bool (b, L). Of equal ones the leftmost."""
    return key.argsort(dim=1, descending=True, stable=True).argsort(1) < count


# --- rules that decide without asking the network ---------------------------------------------------------------


def ancestral(now):
    """Each masked position by itself, with the chance that the reverse of the forward process gives it (MDLM, eq. 6).

    The chance is (m_k - m_{k+1}) / m_k. Exact as the grid gets finer, true to its schedule at any number of steps.
    """
    return now.open & (now.u < (now.here - now.there) / now.here)


def first_hitting(now):
    """One masked position a step, chosen at random (arXiv:2409.02908): the limit of ancestral with endless steps.

    Exact, and the number of steps does not matter. The times at which tokens appear are left out: a network that is
    told the share of masks needs no others.
    """
    return now.open & first(now.u.masked_fill(~now.open, -1), 1)


def random(now):
    """Masked positions in random order, as many as the grid says."""
    return now.open & first(now.u.masked_fill(~now.open, -1), due(now))


# --- rules that ask first ---------------------------------------------------------------------------------------


def best_first(now):
    """The positions of the highest key, as many as the grid says (MaskGIT, arXiv:2202.04200, with the
    distribution's confidence)."""
    return now.open & first(now.key, due(now))


def notes(now):
    """The surest positions, max(1, masks // steps left) of them, as in the masked-text-diffusion notes.

    The floor balances itself: floor(N / T) tokens a step first, one more in the last N mod T steps.
    """
    masks = now.open.sum(1, keepdim=True)
    return now.open & first(now.key, (masks // now.left).clamp(min=max(1, now.least)))


def threshold(now):
    """All positions whose likeliest token has at least this probability, and the surest in any case (Fast-dLLM,
    arXiv:2505.22618)."""
    return now.open & (first(now.key, due(now)) | (now.key >= now.value))


def factor(now):
    """The n surest positions as long as (n + 1)(1 - confidence of the n-th) stays below this (Fast-dLLM's factor
    rule, arXiv:2505.22618: then the parallel greedy choice is the joint one)."""
    sure, order = now.key.sort(dim=1, descending=True, stable=True)
    n = torch.arange(1, sure.size(1) + 1, device=sure.device)
    fits = ((n + 1) * (1 - sure) < now.value).cumprod(1).bool()
    return now.open & (first(now.key, due(now)) | torch.zeros_like(fits).scatter(1, order, fits))


def entropy_bounded(now):
    """The positions of least entropy whose entropies, but for the largest, sum to at most this many nats (EB-Sampler,
    arXiv:2505.24857): a bound on how much the tokens written together depend on each other."""
    return now.open & (first(now.key, due(now)) | _fits(now.key, now.value))


def _fits(key, bound):
    """Positions (b, L) of least entropy, key (b, L) being minus that, whose entropies but the largest sum to the bound."""
    entropy, order = (-key).sort(dim=1, stable=True)
    entropy = entropy.nan_to_num(posinf=1e9)
    fits = entropy.cumsum(1) - entropy <= bound
    return torch.zeros_like(fits).scatter(1, order, fits)


LOCAL_BOUND = 0.1  # nats


def local_entropy(now):
    """entropy_bounded (at 0.1 nats) in every stretch of so many positions by itself: what is far apart depends less on
    each other, so a long text takes hardly more evaluations than a short one."""
    b, L = now.key.shape
    size = max(1, int(min(now.value, L)))
    stretches = F.pad(now.key, (0, -L % size), value=-math.inf).view(-1, size)
    fits = _fits(stretches, LOCAL_BOUND).view(b, -1)[:, :L]
    return now.open & (first(now.key, due(now)) | fits)


# --- rules that hide tokens again -------------------------------------------------------------------------------


def _surest(now):
    """Positions to be visible after this step: as many as the grid says, by the confidence that each had when its
    token was drawn."""
    confidence = torch.where(now.open, now.key, now.confidence.to(now.key.dtype))
    confidence = confidence.masked_fill(~(now.open | now.written), -math.inf)
    return first(confidence, now.written.sum(1, keepdim=True) + due(now))


def remask(now):
    """The micro-dLLMs' confidence re-masking, repaired: every masked position gets a token, then the least sure are
    hidden again, earlier ones too. Tokens carry over unless hidden, and none is rewritten while visible."""
    surest = _surest(now)
    return now.open & surest | now.written & ~surest


def _remdm(now, sigma):
    """Hide each written position with chance sigma (b, 1 or L), and write each masked one with the chance that keeps the
    marginals of the forward process: (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t) (ReMDM, arXiv:2503.00307).

    That is for one sigma for all. remdm_conf has one for each written position and 0 at masks: what it hides is not made
    up for, so it lags behind its schedule and writes the rest in the last step."""
    write = (now.here - now.there + sigma * (1 - now.here)) / now.here
    return now.open & (now.u < write) | now.written & (now.u < sigma)


def _sigma_max(now):
    """The largest chance to hide a token that keeps the marginals: min(1, (1 - alpha_s) / alpha_t), (b, 1)."""
    return (now.there / (1 - now.here).clamp(min=1e-12)).clamp(max=1)


def remdm_cap(now):
    """As ancestral, and each written token is hidden again with at most this chance (ReMDM-cap)."""
    return _remdm(now, _sigma_max(now).clamp(max=now.value))


def remdm_rescale(now):
    """As ancestral, and each written token is hidden again with this share of the largest chance (ReMDM-rescale)."""
    return _remdm(now, now.value * _sigma_max(now))


def remdm_conf(now):
    """As ancestral, and tokens that were unlikely when they were written are hidden again more often (ReMDM-conf)."""
    weight = torch.where(now.written, (-now.chosen).exp(), 0)
    return _remdm(now, now.value * _sigma_max(now) * weight / weight.sum(1, keepdim=True).clamp(min=1e-12))


def remdm_loop(now):
    """As ancestral down to a tenth of the masks, then rewriting for half of the steps, each written token hidden with
    this chance, then to the end (ReMDM-loop). It has its own grid, --schedule does not matter."""
    return _remdm(now, torch.where(now.here == now.there, _sigma_max(now).clamp(max=now.value), 0.0))


def loop_grid(t):
    """Masked share over time 1 -> 0 of ReMDM-loop: down to .1 at t = .55, kept there to t = .05, then to 0."""
    return torch.where(t > 0.55, 1 - 0.9 * (1 - t) / 0.45, torch.where(t >= 0.05, 0.1, 2 * t))
