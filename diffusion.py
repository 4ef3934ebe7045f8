"""Diffusion of text: schedules, corruption, losses, the likelihood bound, and the one sampling loop.

The forward process hides tokens: at noise level m each token of a row is MASK with probability m. The network learns
to say what is hidden. Sampling starts from a canvas full of MASKs and fills it in, a few tokens at a time. Block diffusion
does so from left to right, block by block; uniform noise (utils/uniform.py) has random tokens instead of MASKs; and an
autoregressive model, to compare with, is asked for one token after the other.

Everything here is a function of the masked share m of a row, in [0, 1], or of the integer number of masks l. Time t
exists only inside a schedule m(t) and on a sampler's grid.

  B rows, L positions, V real tokens 0..V-1, MASK = V        x0 (B, L) clean ids, xt (B, L) corrupted ids
  CE = -log p(x0_i | xt) at a masked position i, in nats     S = the masked positions of a row, l = |S|
"""
import math
from functools import partial
from itertools import count
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from config import SampleConfig
from utils import blocks, draws, rules, runtime, uniform
from utils.cli import UserError, check_name
from utils.draws import at_least_float32

# --- schedules --------------------------------------------------------------------------------------------------
# A schedule is the masked share m(t), rising from 0 at t = 0 to 1 at t = 1, and its inverse t(m). The survival
# probability of the papers is alpha = 1 - m. No name is just "cosine": at least four different curves are called so.


class Schedule(NamedTuple):
    mask_rate: Callable  # t -> m
    time: Callable       # m -> t


_S = 0.008  # the offset of Nichol & Dhariwal (arXiv:2102.09672), copied by the notes
_PHI0 = _S / (1 + _S) * math.pi / 2

SCHEDULES = {
    # MDLM, LLaDA, the guide
    "linear": Schedule(lambda t: t, lambda m: m),
    # the micro-dLLMs' documents, alpha = cos(pi t / 2); 2 sin^2(x / 2) is 1 - cos(x) without cancellation
    "cos": Schedule(lambda t: 2 * torch.sin(math.pi / 4 * t) ** 2, lambda m: 4 / math.pi * torch.asin((m / 2).sqrt())),
    # the BPE micro-dLLM's published code, alpha = cos^2(pi t / 2)
    "cos2": Schedule(lambda t: torch.sin(math.pi / 2 * t) ** 2, lambda m: 2 / math.pi * torch.asin(m.sqrt())),
    # the masked-text-diffusion notes, without their clip at .999
    "cos2_s008": Schedule(
        lambda t: 1 - (torch.cos((t + _S) / (1 + _S) * math.pi / 2) / math.cos(_PHI0)) ** 2,
        lambda m: (1 + _S) * 2 / math.pi * torch.acos((1 - m).sqrt() * math.cos(_PHI0)) - _S),
    # MD4's polynomial with exponent 2 (arXiv:2406.04329)
    "poly2": Schedule(lambda t: t**2, lambda m: m.sqrt()),
    # what MD4, Duo and dLLM call cosine: masks fast at small t where "cos" masks slowly
    "md4_cosine": Schedule(lambda t: torch.sin(math.pi / 2 * t), lambda m: 2 / math.pi * torch.asin(m)),
}


def _with_ends(function, x):
    """function(x) with the ends 0 -> 0 and 1 -> 1 set, not computed: 2 sin^2(pi / 4) is not 1 in floats."""
    return torch.where(x <= 0, 0.0, torch.where(x >= 1, 1.0, function(x.clamp(0, 1)).clamp(0, 1)))


def mask_rate(schedule, t):
    """Masked share m(t) of the named schedule, in t's shape."""
    return _with_ends(SCHEDULES[schedule].mask_rate, t)


def time_of(schedule, m):
    """Time t(m) at which the named schedule has masked the share m, in m's shape."""
    return _with_ends(SCHEDULES[schedule].time, m)


def mask_rate_slope(schedule, t):
    """dm/dt, in t's shape, by automatic differentiation: a hand-written derivative is one more thing to get wrong."""
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        return torch.autograd.grad(SCHEDULES[schedule].mask_rate(t).sum(), t)[0]


# --- corruption -------------------------------------------------------------------------------------------------


def given_tokens(cfg):
    """How many tokens at the start of a row are never masked: the `<|endoftext|>` that every document row starts with.

    It carries no information, so the bound is the same; but it is what tells positions apart when all else is hidden,
    since rotary positions are relative.
    """
    return int(cfg.rows == "document")


class Corruption(NamedTuple):
    masked: torch.Tensor  # (B, L) bool: what is hidden, replaced (uniform noise) or predicted (autoregressive)
    weight: torch.Tensor  # (B,) float32; the loss of a row is weight * sum of CE over masked / L; or, with blocks, (B, K)
    #                       weights of its K blocks
    index: torch.Tensor = None  # (N,) flat positions of the masked ones, and -1 to fill up; found on the CPU, so that
    #                             a GPU need not wait
    noise: torch.Tensor = None  # (B, L) long, modulo V the tokens that uniform noise puts there
    level: torch.Tensor = None  # (B,) float32 noise level of uniform noise, which a row does not show

    def to(self, device):
        index = self.index
        if index is None and self.noise is None:
            index = self.masked.flatten().nonzero()[:, 0]
        return self._replace(index=index).each(lambda part: runtime.move(part, device))

    def each(self, function):
        """A Corruption of what `function` makes of each part that there is."""
        return Corruption(*(part if part is None else function(part) for part in self))


def draw_corruption(cfg, B, L, generator, density=None):
    """Masks and loss weights of a whole (global) batch of B rows of L tokens, on the CPU; see `Corruption`.

    cfg.corruption       count      an exact number of masks per row, stratified over the batch: no row without a
                                    mask, no 1/t tail, an 8 times smaller deviation of the batch loss at L = 256. With
                                    blocks, of each block: with one token a block, all are always masked
                         bernoulli  each token by itself, as in the sources
    cfg.diffusion_steps  0: continuous time, T: the sources' T discrete times 1/T, ..., 1 (bernoulli only)
    cfg.loss_weighting   elbo   the negative ELBO in nats per token, whatever the schedule: with counts
                                1 / (p(l) l) per masked token, where p(l) is the schedule's law of l; with bernoulli
                                m'(t) / m(t), or T (m_k - m_{k-1}) / m_k in discrete time (MDLM, arXiv:2406.07524)
                         flat   1 per masked token: the same minimum, less weight on nearly clean rows
                         clip   elbo, but at most 5 per masked token
                         pooled the sources' mean over all masked tokens of the batch
                         full   the char micro-dLLM's mean over all positions, visible ones included (see `loss`)
    density              (n,) of the times that are drawn (`draws.warped`), whatever weights its rows' losses so that
                         their mean is what it is without
    """
    T, given, own = cfg.diffusion_steps, given_tokens(cfg), block_len(cfg)
    if cfg.objective == "ar":
        return Corruption((torch.arange(L) >= given).repeat(B, 1), torch.ones(B))
    units, n = (B * (L - given) // own, own) if own else (B, L - given)  # what has a noise level of its own
    u = draws.warped(draws.stratified(units // 2 if cfg.complementary else units, generator), density)
    if own:  # strata are fixed to rows, and so must not be to places in a row
        u = u.view(B, -1)
        u = u.gather(1, torch.rand(u.shape, generator=generator).argsort(1)).flatten()
    if cfg.corruption == "count":
        counts = counts_of(cfg, u, n)
        if cfg.complementary:
            numbers = torch.rand(B // 2, n, generator=generator)
            pair = draws.first_of(numbers, counts), ~draws.first_of(numbers, counts % n)  # l and n - l; of n, both
            masked = torch.stack(pair, 1).flatten(0, 1)
            counts = masked.sum(1)
        else:
            masked = draws.exactly(counts, n, generator)
        begin, end = (time_of(cfg.schedule, (counts - less).double() / n) for less in (1, 0))
        elbo = 1 / ((end - begin) * counts)
        ratio = (end - begin) / (draws.cdf(end, density) - draws.cdf(begin, density))
    else:
        t = (u * T).floor() / T + 1 / T if T else u.clamp(min=1e-9)
        m = mask_rate(cfg.schedule, t).clamp(max=uniform.MOST if cfg.objective == "uniform" else 1)
        masked = torch.rand(B, n, generator=generator) < m[:, None]
        elbo = T * (m - mask_rate(cfg.schedule, t - 1 / T)) / m if T else mask_rate_slope(cfg.schedule, t) / m
        ratio = 1 / draws.density_at(t, density)
    masked = F.pad(masked.view(B, -1), (given, 0))
    if cfg.objective == "uniform":
        noise = torch.randint(2**62, (B, L), generator=generator)
        return Corruption(masked, (ratio * mask_rate_slope(cfg.schedule, t)).float(), None, noise, m.float())
    if cfg.loss_weighting == "elbo":
        weight = elbo
    elif cfg.loss_weighting == "clip":
        weight = elbo.clamp(max=5.0)
    elif cfg.loss_weighting == "pooled":
        weight = torch.full((units,), masked.numel() / max(1, masked.sum().item()))
    else:  # flat and full
        weight = torch.ones(units)
    return Corruption(masked, (ratio * weight).float().view((B, -1) if own else (B,)))


def counts_of(cfg, u, n):
    """Numbers of masks 1..n, in u's shape, that the uniforms u in [0, 1] stand for under the schedule."""
    return (1 + (mask_rate(cfg.schedule, u) * n).floor().long()).clamp(max=n)


def split_corruption(cfg, whole, rows, size, density=None):
    """The part of `whole`, a batch's Corruption, that belongs to rows (a slice), in pieces of `size` rows (whole pairs,
    with complementary masks).

    With counts, all pieces get an index of the same length at every step, filled up with -1: what their rows can mask at
    most. The strata and their order are fixed, so that is hardly more than what they mask on average.
    """
    B, L = whole.masked.shape
    counted = cfg.corruption == "count" and cfg.objective != "ar"
    if counted:
        pairs, K = 2 if cfg.complementary else 1, whole.weight[0].numel()
        units, n = B // pairs * K, (L - given_tokens(cfg)) // K
        most = counts_of(cfg, draws.warped((draws.stratum_of(units) + 1).double() / units, density), n)  # of each unit
        if pairs == 2:  # l and n - l, but n and n
            most = torch.where(most == n, n, n / 2).repeat_interleave(2)
        bound = math.ceil(max(part.sum().item() for part in most.view(B, K).split(size)))
    pieces = []
    for start in range(rows.start, rows.stop, size):
        piece = whole.each(lambda part: part[start:start + size])
        if counted:
            index = piece.masked.flatten().nonzero()[:, 0]
            assert len(index) <= bound, (len(index), bound)
            piece = piece._replace(index=F.pad(index, (0, bound - len(index)), value=-1))
        elif cfg.objective != "uniform":
            piece = piece._replace(index=piece.masked.flatten().nonzero()[:, 0])
        pieces.append(piece)
    return pieces


def hide(x0, masked, mask_id):
    """x0 (B, L) with MASK at the masked (B, L) positions: the forward process."""
    return torch.where(masked, mask_id, x0)


# --- what a network of each family is asked ---------------------------------------------------------------------
# A masked network sees all. An autoregressive one sees what is to the left, and position i reads token i - 1 (the first
# reads MASK), so that all L tokens of a row are predicted, as in diffusion. One of blocks sees its own block and those
# to the left.


def block_len(cfg):
    """Tokens of a block of block diffusion (BD3-LM, arXiv:2503.09573); 0: the window is one block, plain diffusion."""
    return 0 if cfg.block_len in (0, cfg.block_size) else cfg.block_len


def options_of(cfg):
    """What `sample` and `predict` need to know about a model that was trained with cfg (dict)."""
    return {"objective": cfg.objective, "block_len": block_len(cfg), "given": given_tokens(cfg)}


def sample_options(how):
    """Options of `sample` for a dict of SampleConfig's group "how"."""
    return {"refresh" if name == "cache_refresh" else name: value for name, value in how.items()}


def way_of_writing(cfg, sampler):
    """How a model of cfg's family writes, in a word: the sampler, where there is a choice."""
    return {"ar": "left to right", "uniform": "from uniform noise"}.get(cfg.objective, sampler)


def predict(model, ids, *, objective="masked", block_len=0, given=0, select=None):
    """Logits of a network of any family but uniform for the canvas ids (B, L): (B, L, V), or (N, V) with `select`.

    What is asked at a position is the token there, given all MASKs and tokens that the family may look at.
    """
    hidden = ids == model.vocab_size - 1
    if objective == "ar":
        return model(blocks.shifted(ids, model.vocab_size - 1), None, attention="causal", select=select)
    if block_len:
        own = blocks.number(ids.size(1), block_len, given, ids.device)
        return model(ids, blocks.level(hidden, block_len, given), attention=own[None] <= own[:, None], select=select)
    return model(ids, hidden.float().mean(1), select=select)


# --- losses -----------------------------------------------------------------------------------------------------


def token_nll(logits, targets):
    """-log p of targets (N,) under logits (N, V): (N,) nats, in float32 at least."""
    return F.cross_entropy(at_least_float32(logits), targets, reduction="none")


def loss(model, x0, corruption, full=False, token_nll=token_nll, *, objective="masked", block_len=0, given=0):
    """Training loss of each row, (B,) nats per token, for x0 (B, L) long.

    full=True is the char micro-dLLM's loss over all positions; it falls as the network learns to copy what it sees.
    token_nll: a compiled one may be given, which does not hold all the logits in float32.
    objective="ar": the exact -log p, all tokens after the `given` ones predicted. block_len: block diffusion, whose
    network sees the clean row beside the corrupted one (`blocks.doubled_mask`).
    """
    B, L = x0.shape
    if full:
        logits = predict(model, hide(x0, corruption.masked, model.vocab_size - 1))
        return token_nll(logits.flatten(0, 1), x0.flatten()).view(B, L).mean(1)
    masked, weight, index, *_ = corruption.to(x0.device)
    row, place = torch.where(index < 0, B, index // L), index % L  # what fills up belongs to row B, and is left out
    index = index.clamp(min=0)
    options = {"objective": objective, "block_len": block_len, "given": given}
    ce = token_nll(logits_of_hidden(model, x0, masked, index, **options), x0.flatten()[index])
    if block_len:
        own = blocks.number(L, block_len, given, x0.device).clamp(min=0)
        return ce.new_zeros(B + 1).index_add(0, row, ce * F.pad(weight, (0, 0, 0, 1))[row, own[place]])[:B] / L
    return ce.new_zeros(B + 1).index_add(0, row, ce)[:B] * weight / L


def logits_of_hidden(model, x0, masked, index, *, objective="masked", block_len=0, given=0):
    """Logits (N, V) at the flat positions index (N,) of x0 (B, L), of which the masked (B, L) ones are hidden."""
    if objective == "ar":
        return predict(model, x0, objective=objective, select=index)
    xt, L = hide(x0, masked, model.vocab_size - 1), x0.size(1)
    if not block_len:
        return predict(model, xt, select=index)
    level = F.pad(blocks.level(masked, block_len, given), (0, L))  # and the clean row is clean
    return model(torch.cat((xt, x0), 1), level, attention=blocks.doubled_mask(L, block_len, given, x0.device),
                 positions=torch.arange(L, device=x0.device).repeat(2), select=index // L * 2 * L + index % L)


def uniform_loss(model, x0, corruption, cfg, token_nll=None):
    """Training loss of each row under uniform noise, (B,) nats per token: the closed-form bound (`uniform.nelbo`)."""
    masked, weight, _, noise, level = corruption.to(x0.device)
    xt = torch.where(masked, noise % (model.vocab_size - 1), x0)
    integrand = uniform.nelbo(at_least_float32(model(xt, level)), xt, x0, level)
    given = given_tokens(cfg)
    return integrand[:, given:].sum(1) * weight / x0.size(1)


@torch.no_grad()
def nll_bound(model, x0, passes=1, given=0, rows_at_once=64, *, block_len=0):
    """Upper bound on -log p(x0): (R, passes) nats per token, for x0 (R, L) long; its mean over passes is unbiased.

    -log p(x0) <= E_l [ (L / l) E_S sum of CE over S ], l uniform on 1..L and S a uniform set of l positions (LLaDA,
    arXiv:2502.09992, eq. 14), with blocks so for each of them. The same whatever schedule or loss the network was trained
    with, and its masks are always the same, so that checkpoints and runs compare. Each pass stratifies the counts over
    all rows, and gives them to the rows in a new random order. The first `given` tokens of a row are certain
    (`given_tokens`): never masked, and without cost.
    """
    R, L = x0.shape
    units, n = (R * (L - given) // block_len, block_len) if block_len else (R, L - given)
    generator = torch.Generator().manual_seed(0)
    out = torch.empty(R, passes)
    for k in range(passes):
        u = draws.stratified(units, generator)[torch.randperm(units, generator=generator)]
        counts = 1 + (u * n).floor().long()
        masked = F.pad(draws.exactly(counts, n, generator).view(R, -1), (given, 0))
        weight = (n / counts).float().view((R, -1) if block_len else (R,))
        for rows in torch.arange(R).split(rows_at_once):
            batch = Corruption(masked[rows], weight[rows]).to(x0.device)
            part = loss(model, x0[rows.to(x0.device)], batch, block_len=block_len, given=given)
            out[rows, k] = part.float().cpu()
    return out


@torch.no_grad()
def uniform_bound(model, x0, passes, cfg, rows_at_once):
    """Upper bound on -log p(x0) under uniform noise: (R, passes) nats per token. Times are stratified over all rows, and
    m = t^2, since the integrand grows like log(1 / m): nothing is cut off below."""
    R, generator = len(x0), torch.Generator().manual_seed(0)
    out = torch.empty(R, passes)
    for k in range(passes):
        t = draws.stratified(R, generator)[torch.randperm(R, generator=generator)]
        m = (t**2).clamp(max=uniform.MOST)
        masked = torch.rand(x0.shape, generator=generator) < m[:, None]
        masked[:, :given_tokens(cfg)] = False
        batch = Corruption(masked, (2 * t).float(), None, torch.randint(2**62, x0.shape, generator=generator), m.float())
        for rows in torch.arange(R).split(rows_at_once):
            part = uniform_loss(model, x0[rows.to(x0.device)], batch.each(lambda whole: whole[rows]), cfg)
            out[rows, k] = part.float().cpu()
    return out


@torch.no_grad()
def ar_nll(model, x0, passes, cfg, rows_at_once):
    """-log p(x0) of an autoregressive network, exact: (R, 1) nats per token, for x0 (R, L) long."""
    parts = [loss(model, rows, draw_corruption(cfg, *rows.shape, None), objective="ar") for rows in x0.split(rows_at_once)]
    return torch.cat(parts).float().cpu()[:, None]


class Objective(NamedTuple):
    loss: Callable   # model, x0 (B, L), Corruption, cfg, token_nll -> (B,) nats per token
    bound: Callable  # model, x0 (R, L), passes, cfg, rows at once -> (R, passes) nats per token


def masked_loss(model, x0, corruption, cfg, token_nll=token_nll):
    """`loss` with cfg's settings."""
    return loss(model, x0, corruption, cfg.loss_weighting == "full", token_nll, **options_of(cfg))


OBJECTIVES = {
    "masked": Objective(masked_loss, lambda model, x0, passes, cfg, rows_at_once: nll_bound(
        model, x0, passes, given_tokens(cfg), rows_at_once, block_len=block_len(cfg))),
    "uniform": Objective(uniform_loss, uniform_bound),
    "ar": Objective(masked_loss, ar_nll),
}


def check_names(cfg):
    """Complain of a schedule or an objective that is not there."""
    check_name("schedule", cfg.schedule, SCHEDULES)
    check_name("objective", cfg.objective, OBJECTIVES)


def bound(model, x0, passes, cfg, rows_at_once=64):
    """Upper bound on -log p(x0), (R, passes) nats per token, of a model of cfg's family; exact for ar, in one pass."""
    return OBJECTIVES[cfg.objective].bound(model, x0, passes, cfg, rows_at_once)


def mean_and_errors(nll):
    """Mean of nll (R, passes) and its two standard errors, over rows and over masks.

    rows   what another sample of as many held-out rows would change (their own masks included)
    masks  what other masks on the same rows would change; passes are independent, so their spread tells (nan for one)
    """
    R, passes = nll.shape
    rows = nll.mean(1).std().item() / math.sqrt(R) if R > 1 else math.nan
    masks = nll.mean(0).std().item() / math.sqrt(passes) if passes > 1 else math.nan
    return nll.mean().item(), rows, masks


SPREAD_BINS = 16


@torch.no_grad()
def time_density(model, x0, cfg, rows_at_once=64):
    """Density of times (SPREAD_BINS,), in proportion to the root mean square of the rows' weighted losses at each, for
    x0 (R, L) long: importance sampling, as Nichol & Dhariwal (arXiv:2102.09672, section 3.3). Half of it is uniform, so
    that no weight is above 2."""
    R, generator = len(x0), torch.Generator().manual_seed(0)
    whole = draw_corruption(cfg, R, x0.size(1), generator)
    bins = (draws.stratum_of(R) * SPREAD_BINS // R)
    losses = torch.cat([OBJECTIVES[cfg.objective].loss(model, x0[rows.to(x0.device)], whole.each(lambda part: part[rows]), cfg)
                        for rows in torch.arange(R).split(rows_at_once)]).double().cpu()
    squares = torch.zeros(SPREAD_BINS, dtype=torch.float64).index_add(0, bins, losses**2)
    spread = (squares / torch.bincount(bins, minlength=SPREAD_BINS).clamp(min=1)).sqrt()
    return 0.5 + 0.5 * spread / spread.mean().clamp(min=1e-12)


# --- sampling ---------------------------------------------------------------------------------------------------
# One loop. A sampler is a rule (utils/rules.py) that picks which masked positions get their token now, and perhaps
# which written ones are hidden again; the tokens themselves are always drawn from p(x0 | xt), after temperature, top-k
# and top-p.


class Sampler(NamedTuple):
    """What it does stands in its rule's docstring, which --list shows."""
    pick: Callable         # rules.Moment -> (b, L) bool: write these now where masked, hide them where written
    key: Callable = None   # p (N, V) -> (N,), higher goes first; None: positions are picked before the network is asked
    value: float = None    # the rule's number; "threshold:0.8" on the command line gives another
    whole: bool = False    # goes to the grid's end, because a full block may get holes again
    grid: Callable = None  # time 1 -> 0 to masked share, where the rule has its own instead of a schedule


SAMPLERS = {
    "ancestral": Sampler(rules.ancestral),
    "first_hitting": Sampler(rules.first_hitting),
    "random": Sampler(rules.random),
    "confidence": Sampler(rules.best_first, rules.max_probability),
    "entropy": Sampler(rules.best_first, rules.negative_entropy),
    "margin": Sampler(rules.best_first, rules.margin),
    "notes": Sampler(rules.notes, rules.max_probability),
    "threshold": Sampler(rules.threshold, rules.max_probability, 0.9),
    "factor": Sampler(rules.factor, rules.max_probability, 1.0),
    "entropy_bounded": Sampler(rules.entropy_bounded, rules.negative_entropy, 0.1),
    "local_entropy": Sampler(rules.local_entropy, rules.negative_entropy, 48),
    "remask": Sampler(rules.remask, rules.max_probability),
    "remdm_cap": Sampler(rules.remdm_cap, value=0.02, whole=True),
    "remdm_rescale": Sampler(rules.remdm_rescale, value=0.015, whole=True),
    "remdm_conf": Sampler(rules.remdm_conf, value=1.0, whole=True),
    "remdm_loop": Sampler(rules.remdm_loop, value=0.02, whole=True, grid=rules.loop_grid),
}


def find_sampler(name):
    """(Sampler, its number) for "threshold" or "threshold:0.8"; a UserError says what is wrong."""
    name, colon, number = name.partition(":")
    check_name("sampler", name, SAMPLERS)
    rule = SAMPLERS[name]
    if not colon:
        return rule, rule.value
    if rule.value is None:
        raise UserError(f"sampler {name} takes no number, got {name}:{number}")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f"sampler {name}:{number}: expected a number of at least 0 after the colon, as in "
                        f"{name}:{rule.value:g}")
    if rule.whole and value > 1:
        raise UserError(f"sampler {name}:{number}: its number is a chance, at most 1")
    return rule, value


@torch.no_grad()
def sample(model, canvas, *, sampler=SampleConfig.sampler, steps=None, schedule="linear", temperature=1.0, top_k=0,
           top_p=1.0, min_tokens=1, guidance=0.0, decode_block=0, window=None, cache="auto", refresh=0, given=0, stop=None,
           top=0, seeds=None, objective="masked", block_len=0, correctors=0):
    """Fill the MASKs of canvas (B, L) long; yields a `rules.Step` after every step.

    sampler       a name in SAMPLERS, or NAME:VALUE with the rule's number
    steps         steps of the grid (default: one a token). No rule but first_hitting, which writes one token a step,
                  takes more evaluations than steps (rounded up in each block); those that look at the data may take fewer
    schedule      masked share over the grid, a name in SCHEDULES; independent of the one trained with
    min_tokens    least number of tokens that a rule with a count writes in a step
    guidance      w of unsupervised classifier-free guidance (SMDM, arXiv:2410.18514): logits (1 + w) with the prompt
                  - w with the prompt masked; twice the work. 0: off. Not with a cache
    decode_block  write left to right in blocks of so many tokens, the grid's steps shared among them (LLaDA); later
                  blocks stay MASK and visible to the network. 0: all at once
    window        most positions that the network can take; a longer canvas is written in blocks, by default of a quarter
                  of the window, each at its right end, with what is before it as context (`window_columns`)
    cache         prefix | dual: keep keys and values of what is before the block, or around it, from the block's
                  first step on (Fast-dLLM, arXiv:2505.22618). Approximate: what was kept does not see what was written
                  since. refresh > 0 computes everything anew every so many steps. none | auto: auto keeps what is
                  finished for models that see nothing to the right of it (`blocks.Exact`)
    given         tokens at the start of a row that are no prompt (`given_tokens`): always in sight
    stop          token id: with decode_block, a row whose finished blocks hold it, after all given text, is filled up
                  with it
    top           how many of the likeliest tokens to keep for viewers, in Step.top
    seeds         one integer a row (default 0, 1, ...): a row gets the same text whatever the rest of the batch
    objective, block_len    of the model (`options_of`): ar and block diffusion write left to right, block by block of the
                  model's own, and see nothing after it; with uniform, steps counts the reverse steps, correctors the
                  sweeps after each (`uniform.sample`), and no sampler, block or cache matters
    Given tokens are never changed, no MASK is left, and MASK is never drawn: the network has no logit for it. Rows that
    are finished, or that write nothing in a step, cost nothing.
    A `model` needs `vocab_size` and `model(ids, noise_level, select=...)`, for a cache also `positions` and `cache`.
    """
    (B, L), device, mask = canvas.shape, canvas.device, model.vocab_size - 1
    rule, value = find_sampler(sampler)
    W = min(L, window or L)
    check_family(objective, block_len, decode_block, guidance, cache, correctors, W < L)
    seeds = torch.tensor(list(range(B) if seeds is None else seeds), device=device)
    top = min(top, mask)
    if objective == "uniform":
        yield from uniform.sample(model, canvas, steps=steps, grid=partial(mask_rate, schedule), seeds=seeds, top=top,
                                  warp=lambda logits: draws.warp(logits, temperature, top_k, top_p), correctors=correctors)
        return
    ar = objective == "ar"
    block_len = 1 if ar else block_len
    decode_block = block_len or min(decode_block or (L if W == L else max(1, W // 4)), L)
    if W < L and decode_block >= W:
        raise UserError(f"a text of {L} tokens is longer than the window of {W}: decode_block={decode_block} must be "
                        f"less than {W}, {W // 4} say")
    precision = torch.float32 if device.type == "mps" else torch.float64
    grid = rule.grid or partial(mask_rate, schedule)
    ids, masked, editable = canvas.clone(), canvas == mask, canvas == mask
    place = torch.arange(L, device=device)
    # of the first block: the first MASK of each row, but a model of blocks has them where it was trained with them
    begin = torch.full((B, 1), given, device=device) if block_len else editable.int().argmax(1, keepdim=True)
    number = (place - begin).clamp(min=0) // decode_block  # (B, L) which block a position belongs to
    total = editable.sum(1)
    given_until = torch.where(editable, 0, place + 1).amax(1, keepdim=True)  # all given text ends before this position
    block = torch.full((B,), -1, device=device)  # that each row is writing; L: the row is finished
    over = torch.ones_like(block, dtype=torch.bool)  # whether that block is finished
    k, wanted = torch.zeros_like(block), torch.ones_like(block)  # steps done and steps planned for that block
    confidence, chosen = (torch.ones(B, L, device=device).masked_fill(masked, 0) for _ in range(2))
    best = torch.zeros(B, L, top, dtype=torch.long, device=device), torch.zeros(B, L, top, device=device)
    kept, evaluations = None, 0
    if block_len and cache == "auto":
        kept = blocks.Exact(B, block_len, given, ar, device)
    elif cache in ("prefix", "dual"):
        kept = blocks.Cache(cache, B, refresh)
    row_evaluations = torch.zeros(B, dtype=torch.long, device=device)
    prompt = ~editable & (place >= given)
    if guidance and not prompt.any():  # nothing to guide
        guidance = 0.0
    for tick in count():
        block = torch.where(over, torch.where(masked, number, L).amin(1), block)
        rows = (block < L).nonzero()[:, 0]
        if not len(rows):
            return
        inside = number == block[:, None]
        k = torch.where(over, 0, k)
        masks = (editable & inside).sum(1)
        share = -(-steps * masks // total.clamp(min=1)) if steps else masks
        wanted = torch.where(over, share.clamp(min=1), wanted)
        left = (wanted - k).clamp(min=1)[rows, None]  # rules that write one token a step may take more than `steps`
        time = lambda steps_left: steps_left.to(precision) / wanted[rows, None]
        u = draws.row_uniforms(seeds, tick, L, precision)
        now = rules.Moment(
            open=(masked & inside)[rows], written=(editable & ~masked & inside)[rows], here=grid(time(left)),
            there=grid(time(left - 1)), left=left, u=u[0, rows], confidence=confidence[rows], chosen=chosen[rows],
            key=None, value=value, least=min_tokens)
        fresh, remasked = torch.zeros_like(masked), torch.zeros_like(masked)
        asked = now.open
        if rule.key is None:  # decided without asking: rows that write nothing need no evaluation
            change = rule.pick(now)
            asked, remasked[rows] = change & now.open, change & now.written
            busy = asked.any(1)
            rows, asked = rows[busy], asked[busy]
        if len(rows):
            seen, seen_asked, seen_prompt = ids[rows], asked, prompt[rows]  # in the window
            start = begin[rows] + block[rows, None] * decode_block  # of the block, in the canvas and then in the window
            shift = torch.zeros_like(start)
            if W < L:
                columns, shift = window_columns(start, decode_block, given_until[rows], W, L, given, block_len)
                seen, seen_asked, seen_prompt = (x.gather(1, columns) for x in (seen, seen_asked, seen_prompt))
                seen_asked &= shift + torch.arange(W, device=device) < L  # a last block may reach over the end
                start = start - shift
            if block_len and kept:
                logits = kept.logits(model, seen, seen_asked, rows, start[:, 0], shift[:, 0])
            elif block_len:
                logits = predict(model, seen, objective=objective, block_len=block_len, given=given,
                                 select=seen_asked.flatten().nonzero()[:, 0])
            elif kept is None:
                logits = _guided(model, seen, seen_asked, seen_prompt, guidance)
            else:
                logits = kept.logits(model, seen, seen_asked, rows, start, decode_block, block[rows], k[rows])
            logits, pick = at_least_float32(logits), asked
            evaluations = kept.calls if kept else evaluations + (2 if guidance else 1)
            row_evaluations[rows] += 2 if guidance else 1
            p = logits.softmax(-1)
            if rule.key is not None:
                key = torch.full(asked.shape, -math.inf, dtype=p.dtype, device=device)
                now = now._replace(key=key.masked_scatter(asked, rule.key(p)))
                change = rule.pick(now)
                pick, remasked[rows] = change & now.open, change & now.written
            picked = pick[asked]
            tokens = draws.draw(draws.warp(logits[picked], temperature, top_k, top_p), u[1, rows][pick])
            ids[rows] = ids[rows].masked_scatter(pick, tokens)
            chosen[rows] = chosen[rows].masked_scatter(pick, p[picked].gather(1, tokens[:, None])[:, 0].float())
            confidence[rows] = confidence[rows].masked_scatter(asked, rules.max_probability(p).float())
            if top:
                likeliest = p.topk(top)
                for old, new in zip(best, (likeliest.indices, likeliest.values.float())):
                    old[rows] = old[rows].masked_scatter(asked[..., None], new)
            fresh[rows] = pick
        ids.masked_fill_(remasked, mask)
        masked = masked & ~fresh | remasked
        k = k + 1
        over = ~(masked & inside).any(1)
        if rule.whole:
            over &= k >= wanted
        if stop is not None:
            last = (ids == stop) & editable & ~masked & (number <= block[:, None]) & (place >= given_until)
            ended = (over & last.any(1))[:, None] & masked
            ids.masked_fill_(ended, stop)
            confidence.masked_fill_(ended, 1)
            masked, fresh = masked & ~ended, fresh | ended
        if not len(rows) and not (fresh | remasked).any():  # nothing happened
            continue
        yield rules.Step(ids, masked, fresh, remasked, confidence, best if top else None, evaluations,
                         row_evaluations, masked.sum(1) / total.clamp(min=1))


def check_family(objective, block_len, decode_block, guidance, cache, correctors, beyond):
    """Refuse what a model of this family cannot do; `beyond`: whether the canvas is longer than the window."""
    own = {"ar": "an autoregressive model", "uniform": "a model of uniform noise"}.get(objective) or (
        block_len and f"a model of blocks of {block_len} tokens")
    if own and guidance:
        raise UserError(f"guidance={guidance} with {own}: only a masked model of the whole window has it")
    if own and cache not in ("auto", "none"):
        raise UserError(f"cache={cache} with {own}: it keeps keys and values by itself (cache=auto), or none")
    if own and decode_block and decode_block != block_len:
        raise UserError(f"decode_block={decode_block} with {own}: leave it out")
    if objective == "uniform" and beyond:
        raise UserError("a model of uniform noise writes no more than its window; make --gen-len smaller")
    if correctors and objective != "uniform":
        raise UserError(f"correctors={correctors}: only a model of uniform noise has them")


def window_columns(start, length, given_until, W, L, given, block_len=0):
    """Which positions (b, W) of a canvas of L the network sees when it writes blocks of `length` that begin at start
    (b, 1), and how far (b, 1) they are shifted: the block at the right end, and what is before it.

    Where given text comes after the block, as given_until (b, 1) tells, up to a quarter of the window looks ahead. The
    first `given` positions are always in sight. A model of blocks (block_len; 1 for ar) looks ahead at nothing, and its
    window moves by a quarter at a time, in whole blocks, so that what it keeps lasts.
    """
    end = start + length
    if block_len:
        stride = max(1, W // 4 // block_len) * block_len
        shift = -(-(end - W).clamp(min=0) // stride) * stride
        columns = (shift + torch.arange(W, device=start.device)).clamp(max=L - 1)
    else:
        ahead = torch.where(given_until > end, min(W // 4, (W - length - given) // 2), 0)
        shift = ((end + ahead).clamp(max=L) - W).clamp(min=0)
        columns = shift + torch.arange(W, device=start.device)
    columns[:, :given] = torch.arange(given, device=start.device)
    return columns, shift


def _guided(model, x, asked, prompt, w):
    """Logits (N, V) at the asked (b, L) positions of x (b, L); with w > 0 sharpened by what the prompt changes."""
    mask, index = model.vocab_size - 1, asked.flatten().nonzero()[:, 0]
    level = (x == mask).float().mean(1)
    if not w:
        return model(x, level, select=index)
    blind = x.masked_fill(prompt, mask)
    both = model(torch.cat((x, blind)), torch.cat((level, (blind == mask).float().mean(1))),
                 select=torch.cat((index, index + x.numel())))
    seeing, without = at_least_float32(both).chunk(2)
    return (1 + w) * seeing - w * without
