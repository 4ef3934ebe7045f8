"""Policies: which positions are unmasked in a step of sampling, and which are masked again.

A policy is a pure function of a `View` that returns (unmask, remask), each (B, L) bool. To add a
sampler, write a policy and an entry in SAMPLERS, at the end. Positions are chosen by the
distribution p(x0_i | xt) of a position, never by the probability of the token that was drawn
there: that prefers likely tokens and collapses the entropy of the text (on the toy distribution
of the tests from 3.70 to 1.69 nats).
"""

import functools
import math
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from utils.cli import UserError, check_name


class View(NamedTuple):
    """What a policy sees of B rows of L positions: those of the block that each row is denoising.
    In rows that are finished nothing is open and nothing unmasked."""

    open: torch.Tensor  # (B, L) bool: masked, and may be unmasked; under uniform noise, all
    unmasked: torch.Tensor  # (B, L) bool: generated, and may be remasked
    m_t: torch.Tensor  # (B, 1) mask ratio of the grid before this step, from 1
    m_s: torch.Tensor  # (B, 1) mask ratio of the grid after it, down to 0
    steps_left: torch.Tensor  # (B, 1) long, this one included; at least 1
    u: torch.Tensor  # (B, L) uniforms of this step
    confidence: torch.Tensor  # (B, L) largest probability, when the position was last computed
    probability: torch.Tensor  # (B, L) of the token that stands there, when it was drawn
    key: torch.Tensor  # (B, L) the sampler's key, higher goes first, -inf where not open
    value: float  # the sampler's number (NAME:VALUE)
    min_tokens: int  # to unmask in a step, if there are so many
    corrects: bool  # a corrector's step, which leaves the noise level as it is

    @property
    def none(self):
        """No position."""
        return torch.zeros_like(self.open)

    def scored(self, asked, p, key):
        """With the sampler's key of p (N, V), the distributions at the asked (B, L) positions; as
        it is for a sampler without."""
        if key is None:
            return self
        nothing = torch.full(asked.shape, -math.inf, dtype=p.dtype, device=p.device)
        return self._replace(key=nothing.masked_scatter(asked, key(p)))


# --- keys: p (N, V) -> (N,), higher goes first ---------------------------------------------------


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


# --- how many, and the best of a key -------------------------------------------------------------


def due(view):
    """Tokens to unmask in this step to keep up with the grid, (B, 1) long, at least one.

    Balanced: N masks in T <= N steps are N / T a step, rounded so that they sum to N. So no policy
    that unmasks as many takes more than T steps, whatever its data say.
    """
    masks = view.open.sum(1, keepdim=True)
    total = masks + view.unmasked.sum(1, keepdim=True)
    visible = (total * (1 - view.m_s) + 1e-9).floor().long()
    return (masks - total + visible).clamp(min=max(1, view.min_tokens))


def first(key, count):
    """The `count` (B, 1) positions of the highest key (B, L), of equal ones the leftmost: bool."""
    return key.argsort(dim=1, descending=True, stable=True).argsort(1) < count


# --- policies that decide before the network is asked --------------------------------------------


def ancestral(view):
    """Each masked position by itself, with the probability (m_t - m_s) / m_t of the reverse process
    (MDLM, arXiv:2406.07524, eq. 6). Exact as the grid gets finer, true to its schedule at any
    number of steps."""
    return view.open & (view.u < (view.m_t - view.m_s) / view.m_t), view.none


def first_hitting(view):
    """One masked position a step, chosen at random (arXiv:2409.02908): the limit of ancestral with
    endless steps. Exact, and the number of steps does not matter. The times at which tokens appear
    are left out: a network that is told the mask ratio needs no others."""
    return view.open & first(view.u.masked_fill(~view.open, -1), 1), view.none


def random(view):
    """Masked positions in random order, as many as the grid says."""
    return view.open & first(view.u.masked_fill(~view.open, -1), due(view)), view.none


# --- policies that ask first ---------------------------------------------------------------------


def best_first(view):
    """The positions of the highest key, as many as the grid says (MaskGIT, arXiv:2202.04200, with
    the distribution's confidence)."""
    return view.open & first(view.key, due(view)), view.none


def notes(view):
    """The surest positions, max(1, masks // steps left) of them, as in the masked-text-diffusion
    notes. The floor balances itself: floor(N / T) tokens a step first, one more in the last
    N mod T steps."""
    masks = view.open.sum(1, keepdim=True)
    count = (masks // view.steps_left).clamp(min=max(1, view.min_tokens))
    return view.open & first(view.key, count), view.none


def threshold(view):
    """All positions whose likeliest token has at least this probability, and the surest in any case
    (Fast-dLLM, arXiv:2505.22618)."""
    return view.open & (first(view.key, due(view)) | (view.key >= view.value)), view.none


def factor(view):
    """The n surest positions as long as (n + 1)(1 - confidence of the n-th) stays below this
    (Fast-dLLM's factor rule, arXiv:2505.22618: then the parallel greedy choice is the joint
    one)."""
    sure, order = view.key.sort(dim=1, descending=True, stable=True)
    n = torch.arange(1, sure.size(1) + 1, device=sure.device)
    fits = ((n + 1) * (1 - sure) < view.value).cumprod(1).bool()
    fits = torch.zeros_like(fits).scatter(1, order, fits)
    return view.open & (first(view.key, due(view)) | fits), view.none


def entropy_bounded(view):
    """The positions of least entropy whose entropies, but for the largest, sum to at most this many
    nats (EB-Sampler, arXiv:2505.24857): a bound on how much the tokens that are unmasked together
    depend on each other."""
    return view.open & (first(view.key, due(view)) | _fits(view.key, view.value)), view.none


def _fits(key, bound):
    """Positions (B, L) of least entropy, key (B, L) being minus that, whose entropies but the
    largest sum to the bound."""
    entropy, order = (-key).sort(dim=1, stable=True)
    entropy = entropy.nan_to_num(posinf=1e9)
    fits = entropy.cumsum(1) - entropy <= bound
    return torch.zeros_like(fits).scatter(1, order, fits)


LOCAL_BOUND = 0.1  # nats


def local_entropy(view):
    """entropy_bounded (at 0.1 nats) in every stretch of so many positions by itself: what is far
    apart depends less on each other, so a long text takes hardly more NFE than a short one."""
    B, L = view.key.shape
    size = max(1, int(min(view.value, L)))
    stretches = F.pad(view.key, (0, -L % size), value=-math.inf).view(-1, size)
    fits = _fits(stretches, LOCAL_BOUND).view(B, -1)[:, :L]
    return view.open & (first(view.key, due(view)) | fits), view.none


# --- policies that mask tokens again -------------------------------------------------------------


def remask(view):
    """The micro-dLLMs' confidence re-masking, repaired: of all positions, the surest are unmasked
    after this step, as many as the grid says, each by its confidence when it was last computed. So
    every masked position may get a token, and the least sure, earlier ones too, are masked again.
    Tokens carry over unless remasked, and none is changed while it is visible."""
    confidence = torch.where(view.open, view.key, view.confidence.to(view.key.dtype))
    confidence = confidence.masked_fill(~(view.open | view.unmasked), -math.inf)
    surest = first(confidence, view.unmasked.sum(1, keepdim=True) + due(view))
    return view.open & surest, view.unmasked & ~surest


def _remdm(view, sigma):
    """Remask with the probability sigma (B, 1 or L), and unmask with the one that keeps the
    marginals of the forward process: (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t) (ReMDM,
    arXiv:2503.00307).

    That holds for one sigma for all. remdm_conf has one for each unmasked position and 0 at masks:
    what it remasks is not made up for, so it lags behind its schedule and unmasks the rest in the
    last step.
    """
    unmask = (view.m_t - view.m_s + sigma * (1 - view.m_t)) / view.m_t
    return view.open & (view.u < unmask), view.unmasked & (view.u < sigma)


def _sigma_max(view):
    """The largest sigma that keeps the marginals: min(1, (1 - alpha_s) / alpha_t), (B, 1)."""
    return (view.m_s / (1 - view.m_t).clamp(min=1e-12)).clamp(max=1)


def remdm_cap(view):
    """As ancestral, and each unmasked token is remasked with at most this probability
    (ReMDM-cap)."""
    return _remdm(view, _sigma_max(view).clamp(max=view.value))


def remdm_rescale(view):
    """As ancestral, and each unmasked token is remasked with this share of the largest probability
    (ReMDM-rescale)."""
    return _remdm(view, view.value * _sigma_max(view))


def remdm_conf(view):
    """As ancestral, and tokens that were unlikely when they were drawn are remasked more often
    (ReMDM-conf)."""
    weight = torch.where(view.unmasked, (-view.probability).exp(), 0)
    share = weight / weight.sum(1, keepdim=True).clamp(min=1e-12)
    return _remdm(view, view.value * _sigma_max(view) * share)


def remdm_loop(view):
    """As ancestral down to a tenth of the masks, then for half of the steps each unmasked token is
    remasked with this probability, then to the end (ReMDM-loop). It has its own grid, --schedule
    does not matter."""
    sigma = _sigma_max(view).clamp(max=view.value)
    return _remdm(view, torch.where(view.m_t == view.m_s, sigma, 0.0))


def loop_grid(t):
    """Mask ratio over time 1 -> 0 of ReMDM-loop: to .1 at t = .55, there until t = .05, then to
    0."""
    return torch.where(t > 0.55, 1 - 0.9 * (1 - t) / 0.45, torch.where(t >= 0.05, 0.1, 2 * t))


# --- policies under uniform noise, where every position holds a token and gets another ----------


def reverse(view):
    """The reverse process of uniform noise: every position is drawn anew from its posterior. A
    corrector does so with an eighth of them, chosen at random."""
    if not view.corrects:
        return view.open, view.none
    count = -(-view.open.sum(1, keepdim=True) // 8)
    return view.open & first(-view.u.masked_fill(~view.open, 2), count), view.none


def left_to_right(view):
    """One token after the other, by a network with an autoregressive loss (ar_weight)."""
    return view.open, view.none


def entropy_bounded_strict(view):
    """As entropy_bounded, but no more than fit, whatever the grid says; the last step takes all:
    DiffusionGemma's own rule. With few steps it ends before it has settled."""
    return entropy_bounded(view._replace(m_s=(view.steps_left > 1).to(view.m_s.dtype)))


def accepting(policy):
    """The policy as one that accepts and renoises (DiffusionGemma, arXiv:2608.00146): what it would
    unmask if nothing were is drawn and accepted, all else becomes fresh noise. Nothing is final
    before the end: what was accepted is drawn anew in the next step, or becomes noise."""

    @functools.wraps(policy)
    def accept(view):
        accepted, _ = policy(view._replace(unmasked=view.none))
        return accepted, view.open & ~accepted

    return accept


# --- their names ---------------------------------------------------------------------------------


class Sampler(NamedTuple):
    """What it does stands in its policy's docstring, which --list shows."""

    policy: Callable  # View -> (unmask, remask), each (B, L) bool
    key: Callable = None  # p (N, V) -> (N,); None: it decides before the network is asked
    value: float = None  # the policy's number; "threshold:0.8" gives another
    may_remask: bool = False  # so it goes to the grid's end: a full block may get masks again
    grid: Callable = None  # time 1 -> 0 to mask ratio, where it is not the schedule's
    one_a_step: bool = False  # one token a step, however many steps are asked for
    renoises: bool = False  # under uniform noise: it accepts and renoises


SAMPLERS = {
    "ancestral": Sampler(ancestral),
    "first_hitting": Sampler(first_hitting, one_a_step=True),
    "random": Sampler(random),
    "confidence": Sampler(best_first, max_probability),
    "entropy": Sampler(best_first, negative_entropy),
    "margin": Sampler(best_first, margin),
    "notes": Sampler(notes, max_probability),
    "threshold": Sampler(threshold, max_probability, 0.9),
    "factor": Sampler(factor, max_probability, 1.0),
    "entropy_bounded": Sampler(entropy_bounded, negative_entropy, 0.1),
    "local_entropy": Sampler(local_entropy, negative_entropy, 48),
    "remask": Sampler(remask, max_probability),
    "remdm_cap": Sampler(remdm_cap, value=0.02, may_remask=True),
    "remdm_rescale": Sampler(remdm_rescale, value=0.015, may_remask=True),
    "remdm_conf": Sampler(remdm_conf, value=1.0, may_remask=True),
    "remdm_loop": Sampler(remdm_loop, value=0.02, may_remask=True, grid=loop_grid),
}

# of masks: as good as one token at a time, in a third of the NFE (scripts/lab/ablate.py samplers)
USUAL = "entropy_bounded"

UNIFORM_SAMPLERS = {
    "reverse": Sampler(reverse, may_remask=True),
    "left_to_right": Sampler(left_to_right),
} | {
    name: Sampler(accepting(policy), key, value, may_remask=True, renoises=True)
    for name, policy, key, value in (
        ("confidence", best_first, max_probability, None),
        ("threshold", threshold, max_probability, 0.9),
        ("entropy_bounded", entropy_bounded, negative_entropy, 1.0),
        ("entropy_bounded_strict", entropy_bounded_strict, negative_entropy, 0.1),
    )
}


def find_sampler(name, samplers=SAMPLERS):
    """The Sampler, with its number, for "threshold" or "threshold:0.8"; a UserError says what is
    wrong."""
    name, colon, number = name.partition(":")
    check_name("sampler", name, samplers)
    sampler = samplers[name]
    if not colon:
        return sampler
    if sampler.value is None:
        raise UserError(f"sampler {name} takes no number, got {name}:{number}")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(
            f"sampler {name}:{number}: expected a number of at least 0 after the colon, as in "
            f"{name}:{sampler.value:g}"
        )
    if sampler.may_remask and not sampler.renoises and value > 1:
        raise UserError(f"sampler {name}:{number}: its number is a probability, at most 1")
    return sampler._replace(value=value)
