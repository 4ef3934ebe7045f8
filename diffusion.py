"""Diffusion of text: schedules, the forward process, losses, the bound, and the sampling loop.

The forward process masks tokens, at mask ratio m a share m of them. The network learns to say what
is masked. Sampling begins with a canvas full of MASKs and unmasks it, a few tokens at a time. This
file teaches masked diffusion; utils/families.py has what block diffusion, uniform noise and
autoregressive models do otherwise.

Networks and losses know the mask ratio m of a row, in [0, 1], or its number of masks l. Time t
serves only to determine m: by a schedule m(t), in training and in a sampler's grid.

  B rows, L positions, V real tokens 0..V-1, MASK = V
  x0 (B, L) clean ids, xt (B, L) corrupted ids
  CE = -log p(x0_i | xt) at a masked position i, in nats
  S = the masked positions of a row, l = |S|
  a unit is what has a mask ratio of its own, the row or a block: a row has K units of n positions
"""

import math
from functools import partial
from itertools import count
from math import pi
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from utils import draws, importance, kv_cache, self_conditioning
from utils.cli import check_needs
from utils.corruption import Corruption, loss_per_pass
from utils.denoisers import Denoiser, Guided, MaskNoise, Plain
from utils.draws import at_least_float32
from utils.policies import SAMPLERS, USUAL, find_sampler
from utils.sampling import Clock, State

# --- schedules -----------------------------------------------------------------------------------
# A schedule is the mask ratio m(t), rising from 0 at t = 0 to 1 at t = 1, and its inverse t(m). The
# alpha of the papers is 1 - m. No name is just "cosine": at least four curves are called so.


class Schedule(NamedTuple):
    mask_ratio: Callable  # t -> m
    time: Callable  # m -> t


_S = 0.008  # the offset of Nichol & Dhariwal (arXiv:2102.09672)
_PHI0 = _S / (1 + _S) * pi / 2

SCHEDULES = {
    # MDLM, LLaDA
    "linear": Schedule(lambda t: t, lambda m: m),
    # the micro-dLLMs' documents, alpha = cos(pi t / 2); 2 sin^2(x / 2) is 1 - cos(x), but exact
    "cos": Schedule(
        lambda t: 2 * torch.sin(pi / 4 * t) ** 2, lambda m: 4 / pi * (m / 2).sqrt().asin()
    ),
    # the BPE micro-dLLM's published code, alpha = cos^2(pi t / 2)
    "cos2": Schedule(lambda t: torch.sin(pi / 2 * t) ** 2, lambda m: 2 / pi * m.sqrt().asin()),
    # the masked-text-diffusion notes, without their clip at .999
    "cos2_s008": Schedule(
        lambda t: 1 - (torch.cos((t + _S) / (1 + _S) * pi / 2) / math.cos(_PHI0)) ** 2,
        lambda m: (1 + _S) * 2 / pi * torch.acos((1 - m).sqrt() * math.cos(_PHI0)) - _S,
    ),
    # MD4's polynomial with exponent 2 (arXiv:2406.04329)
    "poly2": Schedule(lambda t: t**2, lambda m: m.sqrt()),
    # what MD4, Duo and dLLM call cosine: masks fast at small t where "cos" masks slowly
    "md4_cosine": Schedule(lambda t: torch.sin(pi / 2 * t), lambda m: 2 / pi * m.asin()),
}


def _with_ends(function, x):
    """function(x) with the ends 0 -> 0 and 1 -> 1 set, not computed: 2 sin^2(pi / 4) is not 1."""
    return torch.where(x <= 0, 0.0, torch.where(x >= 1, 1.0, function(x.clamp(0, 1)).clamp(0, 1)))


def mask_ratio(schedule, t):
    """Mask ratio m(t) of the named schedule, in t's shape."""
    return _with_ends(SCHEDULES[schedule].mask_ratio, t)


def time_of(schedule, m):
    """Time t(m) at which the named schedule has the mask ratio m, in m's shape."""
    return _with_ends(SCHEDULES[schedule].time, m)


def mask_ratio_slope(schedule, t):
    """dm/dt, in t's shape, by autograd: a derivative by hand is one more thing to get wrong."""
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        return torch.autograd.grad(SCHEDULES[schedule].mask_ratio(t).sum(), t)[0]


# --- the forward process -------------------------------------------------------------------------


def q_sample(x0, masked, mask):
    """xt: x0 (B, L) with MASK at the masked (B, L) positions."""
    return torch.where(masked, mask, x0)


def mask_counts(cfg, u, n):
    """Numbers of masks 1..n, in u's shape, for uniforms u in [0, 1]: the schedule's law of l."""
    return (1 + (mask_ratio(cfg.schedule, u) * n).floor().long()).clamp(max=n)


# A corruption is a function of (Config, u (units,) uniforms, n positions of a unit, generator,
# density of times, maskable (units, n) bool, None: all) -> (masked (units, n) bool, the ELBO's
# weight of a masked token (units,), the importance weight of the time that was drawn (units,), how
# many can be masked, (units,) in the order of the strata, or None where that is not known: a
# compiled network wants batches of one size).


def count_masks(cfg, u, n, generator, density=None, maskable=None):
    """Draw a number l of masks by the schedule's law p(l), then l positions of the unit at random.

    Against bernoulli: no row is without a mask, there is no 1/t tail, and the loss of a batch
    deviates 8 times less at L = 256. The ELBO weighs a masked token 1 / (p(l) l). With
    cfg.complementary each u makes two units, that of its l masks and that of the n - l others.
    """
    # a row always gets the same strata, so its largest counts are known
    ends = (draws.stratum_of(len(u)) + 1).double() / len(u)
    most = mask_counts(cfg, importance.inverse_cdf(ends, density), n)
    u_position, n = draws.position_uniforms(len(u), n, generator, maskable)
    counts = mask_counts(cfg, u, n)
    masked = draws.first_of(u_position, counts)
    if cfg.complementary:  # the others of n masks would be none: there both units have all n
        others = ~draws.first_of(u_position, counts % n)
        masked = torch.stack((masked, others), 1).flatten(0, 1)
        counts = masked.sum(1)
        most = torch.where(most == n, n, n / 2).repeat_interleave(2)  # of a pair, half each
    begin = time_of(cfg.schedule, (counts - 1).double() / n)
    end = time_of(cfg.schedule, counts.double() / n)
    drawn = importance.cdf(end, density) - importance.cdf(begin, density)
    return masked, 1 / ((end - begin) * counts), (end - begin) / drawn, most


def bernoulli_masks(cfg, u, n, generator, density=None, maskable=None):
    """Each token by itself, by a coin. The ELBO weighs m'(t) / m(t), or T (m_k - m_{k-1}) /
    m_k in T discrete times 1/T, ..., 1 (MDLM, arXiv:2406.07524)."""
    T = cfg.diffusion_steps
    t = (u * T).floor() / T + 1 / T if T else u.clamp(min=1e-9)
    m = mask_ratio(cfg.schedule, t)
    u_position, _ = draws.position_uniforms(len(u), n, generator, maskable)
    slope = (
        T * (m - mask_ratio(cfg.schedule, t - 1 / T)) if T else mask_ratio_slope(cfg.schedule, t)
    )
    return u_position < m[:, None], slope / m, 1 / importance.density_at(t, density), None


CORRUPTIONS = {"count": count_masks, "bernoulli": bernoulli_masks}

# (the ELBO's weights (units,), masked (B, L)) -> weight of a masked token in each unit
WEIGHTINGS = {
    "elbo": lambda elbo, masked: elbo,  # the NELBO, whatever the schedule
    "flat": lambda elbo, masked: torch.ones_like(elbo),  # less weight on nearly clean rows
    "clip": lambda elbo, masked: elbo.clamp(max=5.0),
    # of much public code: the mean over all masked tokens of the batch
    "pooled": lambda elbo, masked: torch.ones_like(elbo) * masked.numel() / masked.sum().clamp(1),
}


# --- losses and the bound ------------------------------------------------------------------------


def token_nll(logits, targets):
    """-log p of targets (N,) under logits (N, V): (N,) nats, in float32 at least."""
    return F.cross_entropy(at_least_float32(logits), targets, reduction="none")


def masked_loss(logits_of, x0, corruption, token_nll=token_nll, unit_of=None):
    """Weighted cross entropy of the masked tokens of x0 (B, L): (B,) nats per token of each row.

    logits_of  function (Corruption, index (N,)) -> logits (N, V) at those flat positions
    unit_of    (L,) long, which of a row's K weights is that of each position; None: it has one
    """
    (B, L), corruption = x0.shape, corruption.to(x0.device)
    weight, index = corruption.weight, corruption.index
    # the index is filled up with -1 to a fixed length: that goes to a row B, which is left out
    row, place = torch.where(index < 0, B, index // L), index % L
    index = index.clamp(min=0)
    ce = token_nll(logits_of(corruption, index), x0.flatten()[index])
    if unit_of is None:
        return ce.new_zeros(B + 1).index_add(0, row, ce)[:B] * weight / L
    weight = F.pad(weight, (0, 0, 0, 1))[row, unit_of[place]]
    return ce.new_zeros(B + 1).index_add(0, row, ce * weight)[:B] / L


def nelbo_masks(R, K, n, passes, maskable=None):
    """The masks of the bound, for R rows of K units of n positions: yields (masked (R, K n), weight
    (R, K)) for each pass.

    -log p(x0) <= E_l [ (n / l) E_S sum of CE over S ], l uniform on 1..n and S a uniform set of l
    positions (LLaDA, arXiv:2502.09992, eq. 14), summed over the units. For a network that unmasks
    one token at a time in random order, -log p(x0) <= the mean over orders of its summed -log p
    (Jensen); and the step with l masks left costs, in the mean over orders, 1 / l of their CE.

    The same whatever schedule or loss the network was trained with, and always the same, so that
    checkpoints and runs compare. Each pass stratifies the counts over all rows, and gives them to
    the rows in a new random order. maskable (R K, n) bool; None: all.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(passes):
        u = draws.stratified(R * K, generator)[torch.randperm(R * K, generator=generator)]
        u_position, sizes = draws.position_uniforms(R * K, n, generator, maskable)
        counts = 1 + (u * sizes).floor().long()
        yield draws.first_of(u_position, counts).view(R, -1), (sizes / counts).float().view(R, K)


# --- a family: masked diffusion ------------------------------------------------------------------


def bos_tokens(cfg):
    """Tokens at the start of every row that are never noised: the `<|endoftext|>` of documents and
    pairs. It tells positions apart when all else is masked, since rotary positions are relative."""
    return int(cfg.rows != "stream")


class Masked:
    """Masked diffusion (MDLM, arXiv:2406.07524; LLaDA, arXiv:2502.09992): every position sees all
    others. A family is an object like this; utils/families.py has the others, and their names.

    Public: corrupt, loss, nelbo, logits, sampler, denoiser, probes, log_p, fit, cfg and bos.
    Hooks of other masked families: units, unit_of, noised_logits.

    name       in a sentence
    exact      whether `nelbo` is the likelihood itself
    block_len  of blocks that it generates from left to right, seeing nothing to the right of them;
               0: it has none
    carries_over  whether what is visible is right, in training: so it is with masks
    samplers   that it can be sampled with; usual: the name of the one that it is, unless told
    procedure  how it generates, where there is no choice
    needs      {setting of Config or SampleConfig: what it may be, the family's default first};
               `why`: {setting: the reason}
    """

    name, exact, block_len, samplers, procedure = "a masked model", False, 0, SAMPLERS, None
    usual = USUAL
    carries_over = True
    needs = {"correctors": (0,), "ar_weight": (0,)}
    why = dict.fromkeys(needs, "only a model of uniform noise has that")

    def __init__(self, cfg):
        self.cfg, self.bos = cfg, bos_tokens(cfg)

    def units(self, L):
        """(K, n) of a row of L tokens: its units, and the positions of each."""
        return 1, L - self.bos

    def unit_of(self, L, device):
        """(L,) long, which unit each position belongs to; None: a row has one."""

    def fit(self, L):
        """The longest row of at most L tokens that it can be trained on."""
        return L

    def corrupt(self, shape, generator, density=None, given=None):
        """q(xt | x0) of a whole (global) batch of B rows of L tokens, on the CPU: a `Corruption`.

        density  (n,) of the times that are drawn (utils/importance.py); rows are reweighted so that
                 the mean of their losses is what it is without
        given    (B, L) bool, tokens that are never masked, as BOS is: those of prompts
        """
        cfg, (B, L) = self.cfg, shape
        K, n = self.units(L)
        u = draws.stratified(B * K // 2 if cfg.complementary else B * K, generator)
        u = importance.inverse_cdf(u, density)
        if self.block_len:
            u = draws.shuffled(u.view(B, K), generator).flatten()
        draw, maskable = CORRUPTIONS[cfg.corruption], self.maskable(given, n)
        masked, elbo, weight, most = draw(cfg, u, n, generator, density, maskable)
        masked = F.pad(masked.view(B, -1), (self.bos, 0))
        if cfg.loss_weighting != "full":  # which is a loss of its own, without weights
            weight = weight * WEIGHTINGS[cfg.loss_weighting](elbo, masked)
        most = None if most is None else most.view(B, K).sum(1)
        whole = self.pack(masked, weight.float().view(B, K), most)
        return whole._replace(conditioned=self_conditioning.drawn(cfg, B, generator))

    def maskable(self, given, n):
        """What may be masked in each unit of n positions, (units, n) bool; None: all."""
        return None if given is None else ~given[:, self.bos :].reshape(-1, n)

    def pack(self, masked, weight, most=None):
        """A Corruption with the weights (B, K) of a row's units."""
        return Corruption(masked, weight if self.block_len else weight[:, 0], most)

    def loss(self, model, x0, corruption, token_nll=token_nll):
        """Training loss of each row of x0 (B, L) long, (B,) nats per token. token_nll: a compiled
        one may be given, which does not hold all the logits in float32.

        loss_weighting=full is the char micro-dLLM's mean over all positions, visible ones included,
        which falls as the network learns to copy what it sees.
        """
        if self.cfg.loss_weighting == "full":
            xt = q_sample(x0, corruption.masked, model.vocab_size - 1)
            logits = self.logits(model, xt, earlier=corruption.conditioned)
            return token_nll(logits.flatten(0, 1), x0.flatten()).view(x0.shape).mean(1)
        return self.weighted_ce(model, x0, corruption, token_nll)

    def weighted_ce(self, model, x0, corruption, token_nll=token_nll):
        """`masked_loss` of x0 (B, L)."""
        unit_of = self.unit_of(x0.size(1), x0.device)
        noised_logits = partial(self.noised_logits, model, x0)
        return masked_loss(noised_logits, x0, corruption, token_nll, unit_of)

    def nelbo(self, model, x0, passes=1, given=None):
        """Unbiased estimates, one a pass, of the NELBO, an upper bound on -log p(x0): (R, passes)
        nats per token for x0 (R, L) long. given (R, L) bool: tokens that are certain, never masked
        and without cost, BOS always; the mean per token is over all L."""
        R, (K, n) = len(x0), self.units(x0.size(1))
        masks, pad = nelbo_masks(R, K, n, passes, self.maskable(given, n)), (self.bos, 0)
        fixed = (self.pack(F.pad(masked, pad), weight) for masked, weight in masks)
        return loss_per_pass(partial(self.weighted_ce, model), x0, fixed, self.cfg.rows_at_once)

    def noised_logits(self, model, x0, corruption, index):
        """Mask x0 (B, L) where the corruption says, and return the logits (N, V) at the flat
        positions index (N,)."""
        xt = q_sample(x0, corruption.masked, model.vocab_size - 1)
        return self.logits(model, xt, index, corruption.conditioned)

    def logits(self, model, ids, index=None, earlier=None):
        """Logits of a canvas ids (B, L) that is being denoised: (B, L, V), or (N, V) at the flat
        positions index (N,). earlier: see `self_conditioning.ask`."""
        masked = ids == model.vocab_size - 1
        ratio = masked.float().mean(1)
        return self_conditioning.ask(self.cfg, model, ids, ratio, masked, earlier, select=index)

    def sampler(self, how):
        """The Sampler that how (SampleConfig) names."""
        return find_sampler(how.sampler or self.usual, self.samplers)

    def sampler_name(self, how):
        """Its name, as it is shown."""
        return self.procedure or how.sampler or self.usual

    def denoiser(self, model, canvas, how, window=None):
        """The Denoiser of a canvas (B, L) as how (SampleConfig) wants it, in blocks from each row's
        first MASK; window: most positions that the network takes."""
        (B, L), mask, device = canvas.shape, model.vocab_size - 1, canvas.device
        wanted = how.decode_block or (max(1, window // 4) if window and window < L else L)
        decode_block, origin = min(wanted, L), (canvas == mask).int().argmax(1, keepdim=True)
        logits = lambda x, index, seen: self.logits(model, x, index, seen.earlier)
        given = (canvas != mask) & (torch.arange(L, device=device) >= self.bos)
        if how.cache in ("prefix", "dual"):
            network = kv_cache.Approximate(model, B, decode_block, how)
        elif how.guidance and given.any():
            network = Guided(logits, how.guidance, given, mask)
        else:
            network = Plain(logits)
        memory = self_conditioning.memory(self.cfg, model, canvas)
        rest = (decode_block, origin, window, self.bos)
        return Denoiser(network, MaskNoise(mask), canvas, *rest, memory=memory)

    def probes(self, model, shape, number, generator, given=None):
        """For metrics: (mask ratio, Corruption of (B, L) rows) at some `number` of even ratios, of
        what is not given (B, L)."""
        B, (K, n) = shape[0], self.units(shape[1])
        for level in [1.0] if n == 1 else [(i + 0.5) / number for i in range(number)]:
            u, sizes = draws.position_uniforms(B * K, n, generator, self.maskable(given, n))
            counts = (level * torch.ones(B * K).double() * sizes).round().clamp(min=1)
            masked = draws.first_of(u, counts).view(B, -1)
            ratio = level if given is not None else counts[0].item() / n
            yield ratio, Corruption(F.pad(masked, (self.bos, 0)), torch.ones(B))

    def log_p(self, model, x0, corruption, index):
        """log p(x0_i | xt), (N, V), at the flat positions index (N,) of what is corrupted."""
        logits = self.noised_logits(model, x0, corruption, index)
        return at_least_float32(logits).log_softmax(-1)


# --- the reverse process: the sampling loop ------------------------------------------------------
# Each iteration is a tick, which numbers its random draws. The clock says whose `Turn` it is: which
# block each row denoises, from which mask ratio to which. The policy, a pure function of a `View`,
# says what to unmask and to remask. The network is asked for the distributions that it needs: all
# open ones where it has a key, a number that it makes of each; else those that it unmasks.


@torch.no_grad()
def sample(family, model, canvas, how, *, window=None, stop=None, seeds=None, top=0, draft=None):
    """Denoise the MASKs of canvas (B, L) long; yields a `sampling.Step` after every step.

    how     SampleConfig: sampler, steps, schedule, temperature, top_k, top_p, and the rest
    window  most positions that the network takes; a longer canvas is denoised block by block
    stop    token id: a row that has it in a finished block, after all that is given, ends: the
            rest becomes that token; not among the first how.min_len that are generated
    seeds   one integer a row (default 0, 1, ...): a row gets the same text whatever its batch
    top     how many of the likeliest tokens to keep for viewers, in Step.top
    draft   (B, L) long, under uniform noise: the text that stands there at first, of which a share
            how.draft_noise is noise

    Given tokens never change; no MASK is left or drawn: it has no logit. A canvas without MASK
    yields nothing; a finished row asks nothing. (asked, unmask, remask: (B, L) bool.)
    """
    check_needs(family, how)
    sampler, denoiser = family.sampler(how), family.denoiser(model, canvas, how, window)
    denoiser.forbid(stop, how.min_len)
    noise, grid = denoiser.noise, sampler.grid or partial(mask_ratio, how.schedule)
    if draft is not None:
        grid = lambda t: how.draft_noise * mask_ratio(how.schedule, t)
    seeds = range(len(canvas)) if seeds is None else seeds
    uniforms = draws.uniforms_of(seeds, canvas.size(1), canvas.device)
    state = State(canvas, noise, uniforms(0)[0], top, draft)
    clock = Clock(state, denoiser, sampler, grid, how, stop)
    for tick in count(noise.first_tick):
        turn = clock.turn(state)
        if turn is None:
            return
        u_position, u_token = uniforms(tick)
        view = state.view(turn, u_position, sampler, how.min_tokens)  # what the policy sees
        asked = view.open if sampler.key else sampler.policy(view)[0]
        if denoiser.asks_all:  # of rows that unmask something
            asked = view.open & asked.any(1, keepdim=True)
        logits = denoiser(state.ids, asked, turn)  # (N, V)
        p = noise.belief(logits, state.ids, asked, turn)  # p(x0_i | xt), (N, V)
        unmask, remask = sampler.policy(view.scored(asked, p, sampler.key))
        chosen = unmask[asked]  # (N,) bool
        temperature = turn.temperature_at(unmask)
        q = draws.truncate(logits[chosen], temperature, how.top_k, how.top_p)  # (n, V)
        tokens = draws.draw(noise.reverse(q, state.ids, unmask, turn), u_token[unmask])
        state.observe(asked, p)
        state.unmask(unmask, tokens, p[chosen])
        state.remask(remask, u_token)
        clock.advance(state)
        if len(logits) or (state.fresh | state.remasked).any():  # else nothing happened
            yield state.step(denoiser, turn)
