"""Masked diffusion: schedules, corruption, losses, the likelihood bound, and the one sampling loop.

The forward process hides tokens: at noise level m each token of a row is MASK with probability m. The network learns
to say what is hidden. Sampling starts from a canvas full of MASKs and fills it in, a few tokens at a time.

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
from utils import blocks, rules, runtime
from utils.cli import UserError, check_name

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


def stratified(n, generator):
    """n uniforms in [0, 1), (n,) float64, one in each stratum [i/n, (i+1)/n), with one random offset for all.

    Together they cover [0, 1) evenly (variational diffusion models, arXiv:2107.00630). Row r takes the r-th stratum in
    bit-reversed (van der Corput) order, so that every contiguous slice of the rows, a micro-batch or a rank's share, is
    spread evenly too. Which row takes which never changes: what stands in the rows must be in random order.
    """
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    return (stratum_of(n) + offset) / n


def stratum_of(n):
    """Which of n strata each of n rows takes, (n,) long."""
    width = max(1, (n - 1).bit_length())
    return torch.tensor([int(f"{row:0{width}b}"[::-1], 2) for row in range(n)]).argsort().argsort()


def exactly(counts, L, given, generator):
    """Uniformly random masks (B, L) bool with exactly counts (B,) True in each row, none in the first `given`."""
    return F.pad(first_of(torch.rand(len(counts), L - given, generator=generator), counts), (given, 0))


def first_of(numbers, counts):
    """Where the counts (B,) least of each row of numbers (B, n) are: (B, n) bool."""
    order = numbers.argsort(1)
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, torch.arange(order.size(1)) < counts[:, None])


def given_tokens(cfg):
    """How many tokens at the start of a row are never masked: the `<|endoftext|>` that every document row starts with.

    It carries no information, so the bound is the same; but it is what tells positions apart when all else is hidden,
    since rotary positions are relative.
    """
    return int(cfg.rows == "document")


class Corruption(NamedTuple):
    masked: torch.Tensor  # (B, L) bool
    weight: torch.Tensor  # (B,) float32; the loss of a row is weight * sum of CE over masked / L
    index: torch.Tensor = None  # (N,) flat positions of the masked ones, and -1 to fill up; found on the CPU, so that
    #                             a GPU need not wait

    def to(self, device):
        index = self.masked.flatten().nonzero()[:, 0] if self.index is None else self.index
        return Corruption(*(runtime.move(part, device) for part in (self.masked, self.weight, index)))


def draw_corruption(cfg, B, L, generator):
    """Masks and loss weights of a whole (global) batch of B rows of L tokens, on the CPU; see `Corruption`.

    cfg.corruption       count      an exact number of masks per row, stratified over the batch: no row without a
                                    mask, no 1/t tail, an 8 times smaller deviation of the batch loss at L = 256
                         bernoulli  each token by itself, as in the sources
    cfg.diffusion_steps  0: continuous time, T: the sources' T discrete times 1/T, ..., 1 (bernoulli only)
    cfg.loss_weighting   elbo   the negative ELBO in nats per token, whatever the schedule: with counts
                                1 / (p(l) l) per masked token, where p(l) is the schedule's law of l; with bernoulli
                                m'(t) / m(t), or T (m_k - m_{k-1}) / m_k in discrete time (MDLM, arXiv:2406.07524)
                         flat   1 per masked token: the same minimum, less weight on nearly clean rows
                         clip   elbo, but at most 5 per masked token
                         pooled the sources' mean over all masked tokens of the batch
                         full   the char micro-dLLM's mean over all positions, visible ones included (see `loss`)
    """
    T, given = cfg.diffusion_steps, given_tokens(cfg)
    if cfg.corruption == "count":
        n = L - given
        counts = counts_of(cfg, stratified(B // 2 if cfg.complementary else B, generator), n)
        if cfg.complementary:
            numbers = torch.rand(B // 2, n, generator=generator)
            pair = first_of(numbers, counts), ~first_of(numbers, counts % n)  # l and n - l; of n, both
            masked = F.pad(torch.stack(pair, 1).flatten(0, 1), (given, 0))
            counts = masked.sum(1)
        else:
            masked = exactly(counts, L, given, generator)
        chance = time_of(cfg.schedule, counts.double() / n) - time_of(cfg.schedule, (counts - 1).double() / n)
        elbo = 1 / (chance * counts)
    else:
        u = stratified(B, generator)
        t = (u * T).floor() / T + 1 / T if T else u.clamp(min=1e-9)
        m = mask_rate(cfg.schedule, t)
        masked = F.pad(torch.rand(B, L - given, generator=generator) < m[:, None], (given, 0))
        elbo = T * (m - mask_rate(cfg.schedule, t - 1 / T)) / m if T else mask_rate_slope(cfg.schedule, t) / m
    if cfg.loss_weighting == "elbo":
        weight = elbo
    elif cfg.loss_weighting == "clip":
        weight = elbo.clamp(max=5.0)
    elif cfg.loss_weighting == "pooled":
        weight = torch.full((B,), masked.numel() / max(1, masked.sum().item()))
    else:  # flat and full
        weight = torch.ones(B)
    return Corruption(masked, weight.float())


def counts_of(cfg, u, n):
    """Numbers of masks 1..n, in u's shape, that the uniforms u in [0, 1] stand for under the schedule."""
    return (1 + (mask_rate(cfg.schedule, u) * n).floor().long()).clamp(max=n)


def split_corruption(cfg, whole, rows, size):
    """The part of `whole`, a batch's Corruption, that belongs to rows (a slice), in pieces of `size` rows (whole pairs,
    with complementary masks).

    With counts, all pieces get an index of the same length at every step, filled up with -1: what their rows can mask at
    most. The strata and their order are fixed, so that is hardly more than what they mask on average.
    """
    B, L = whole.masked.shape
    if cfg.corruption == "count":
        n, pairs = L - given_tokens(cfg), 2 if cfg.complementary else 1
        most = counts_of(cfg, (stratum_of(B // pairs) + 1).double() / (B // pairs), n)  # of each row
        if pairs == 2:  # l and n - l, but n and n
            most = torch.where(most == n, n, n / 2).repeat_interleave(2)
        bound = math.ceil(max(part.sum().item() for part in most.split(size)))
    pieces = []
    for start in range(rows.start, rows.stop, size):
        part = slice(start, start + size)
        index = whole.masked[part].flatten().nonzero()[:, 0]
        if cfg.corruption == "count":
            assert len(index) <= bound, (len(index), bound)
            index = F.pad(index, (0, bound - len(index)), value=-1)
        pieces.append(Corruption(whole.masked[part], whole.weight[part], index))
    return pieces


def hide(x0, masked, mask_id):
    """x0 (B, L) with MASK at the masked (B, L) positions: the forward process."""
    return torch.where(masked, mask_id, x0)


# --- losses -----------------------------------------------------------------------------------------------------


def at_least_float32(logits):
    """bfloat16 logits as float32, for softmax and losses; float32 and float64 as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def token_nll(logits, targets):
    """-log p of targets (N,) under logits (N, V): (N,) nats, in float32 at least."""
    return F.cross_entropy(at_least_float32(logits), targets, reduction="none")


def loss(model, x0, corruption, full=False, token_nll=token_nll):
    """Training loss of each row, (B,) nats per token, for x0 (B, L) long.

    full=True is the char micro-dLLM's loss over all positions; it falls as the network learns to copy what it sees.
    token_nll: a compiled one may be given, which does not hold all the logits in float32.
    """
    B, L = x0.shape
    if full:
        xt = hide(x0, corruption.masked, model.vocab_size - 1)
        logits = model(xt, corruption.masked.float().mean(1))
        return token_nll(logits.flatten(0, 1), x0.flatten()).view(B, L).mean(1)
    masked, _, index = corruption.to(x0.device)
    row = torch.where(index < 0, B, index // L)  # what fills up belongs to row B, and is left out
    index = index.clamp(min=0)
    logits = model(hide(x0, masked, model.vocab_size - 1), masked.float().mean(1), select=index)
    ce = token_nll(logits, x0.flatten()[index])
    return ce.new_zeros(B + 1).index_add(0, row, ce)[:B] * corruption.weight / L


@torch.no_grad()
def nll_bound(model, x0, passes=1, given=0, rows_at_once=64):
    """Upper bound on -log p(x0): (R, passes) nats per token, for x0 (R, L) long; its mean over passes is unbiased.

    -log p(x0) <= E_l [ (L / l) E_S sum of CE over S ], l uniform on 1..L and S a uniform set of l positions (LLaDA,
    arXiv:2502.09992, eq. 14). The same whatever schedule or loss the network was trained with, and its masks are
    always the same, so that checkpoints and runs compare. Each pass stratifies the counts over all rows, and gives them
    to the rows in a new random order. The first `given` tokens of a row are certain (`given_tokens`): never masked,
    and without cost.
    """
    R, L = x0.shape
    generator = torch.Generator().manual_seed(0)
    out = torch.empty(R, passes)
    for k in range(passes):
        u = stratified(R, generator)[torch.randperm(R, generator=generator)]
        counts = 1 + (u * (L - given)).floor().long()
        masked = exactly(counts, L, given, generator)
        for rows in torch.arange(R).split(rows_at_once):
            batch = Corruption(masked[rows], ((L - given) / counts[rows]).float()).to(x0.device)
            out[rows, k] = loss(model, x0[rows.to(x0.device)], batch).float().cpu()
    return out


def mean_and_errors(nll):
    """Mean of nll (R, passes) and its two standard errors, over rows and over masks.

    rows   what another sample of as many held-out rows would change (their own masks included)
    masks  what other masks on the same rows would change; passes are independent, so their spread tells (nan for one)
    """
    R, passes = nll.shape
    rows = nll.mean(1).std().item() / math.sqrt(R) if R > 1 else math.nan
    masks = nll.mean(0).std().item() / math.sqrt(passes) if passes > 1 else math.nan
    return nll.mean().item(), rows, masks


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


def warp(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Token distribution (N, V) to draw from: temperature, then top-k (0 = all), then top-p (1 = all).

    top-p keeps the likeliest tokens until their sum reaches top_p, the one that crosses it included. Temperature 0 is
    all mass on the likeliest token.
    """
    if temperature == 0:
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
    """Tokens (N,) from p (N, V), which need not be normalised, by inverting the cumulative sum at u (N,) in [0, 1).

    In float64: float32 never draws a token below about 1e-8, which shifts the text's entropy (arXiv:2409.02908). A
    token of probability zero is never drawn. On MPS, which lacks float64, float32 does for vocabularies of some 4,000.
    """
    cumulative = p.to(u.dtype).cumsum(-1)
    return (cumulative <= u[:, None] * cumulative[:, -1:]).sum(-1).clamp(max=p.size(-1) - 1)


def _mix(x):
    """SplitMix64's finaliser on int64 tensors: a one-to-one scrambling of 64 bits (Steele et al. 2014)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def row_uniforms(seeds, k, L, dtype=torch.float64):
    """Uniforms in [0, 1) of step k for rows with the integer seeds (B,): (2, B, L), on the seeds' device.

    A hash of (seed, step, which of the two, position): a row's numbers depend on its own seed alone, are the same on
    every device, and cost no loop over rows and no copy from the host.
    """
    which = torch.arange(2, device=seeds.device)[:, None, None]
    position = torch.arange(L, device=seeds.device)
    bits = _mix(_mix(_mix(_mix(seeds + 1)[None, :, None] + k) + which) + position)
    digits = 53 if dtype == torch.float64 else 24
    return ((bits >> (64 - digits)) & (2**digits - 1)).to(dtype) * 2.0**-digits


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


@torch.no_grad()
def sample(model, canvas, *, sampler=SampleConfig.sampler, steps=None, schedule="linear", temperature=1.0, top_k=0,
           top_p=1.0, min_tokens=1, guidance=0.0, decode_block=0, window=None, cache="none", refresh=0, given=0, stop=None,
           top=0, seeds=None):
    """Fill the MASKs of canvas (B, L) long; yields a `Step` after every step.

    sampler       a name in SAMPLERS, or NAME:VALUE with the rule's number
    steps         steps of the grid (default: one a token). No rule but first_hitting, which writes one token a step,
                  takes more evaluations than steps (rounded up in each block); those that look at the data may take fewer
    schedule      masked share over the grid, a name in SCHEDULES; independent of the one trained with
    min_tokens    least number of tokens that a rule with a count writes in a step
    guidance      w of unsupervised classifier-free guidance (SMDM, arXiv:2410.18514): logits (1 + w) with the prompt
                  - w with the prompt masked; twice the work. 0: off. Not with a cache
    decode_block  write left to right in blocks of so many tokens, the grid's steps shared among them (LLaDA); later
                  blocks stay MASK and visible to the network. 0: all at once
    window        most positions that the network can take; a longer canvas needs decode_block, and each block is
                  written at the right end of the window, with what is before it as context (`window_columns`)
    cache         none | prefix | dual: keep keys and values of what is before the block, or around it, from the block's
                  first step on (Fast-dLLM, arXiv:2505.22618). Approximate: what was kept does not see what was written
                  since. refresh > 0 computes everything anew every so many steps
    given         tokens at the start of a row that are no prompt (`given_tokens`): always in sight
    stop          token id: with decode_block, a row whose finished blocks hold it, after all given text, is filled up
                  with it
    top           how many of the likeliest tokens to keep for viewers, in Step.top
    seeds         one integer a row (default 0, 1, ...): a row gets the same text whatever the rest of the batch
    Given tokens are never changed, no MASK is left, and MASK is never drawn: the network has no logit for it. Rows that
    are finished, or that write nothing in a step, cost nothing.
    A `model` needs `vocab_size` and `model(ids, noise_level, select=...)`, for a cache also `positions` and `cache`.
    """
    (B, L), device, mask = canvas.shape, canvas.device, model.vocab_size - 1
    rule, value = find_sampler(sampler)
    W = min(L, window or L)
    decode_block = min(decode_block or L, L)
    if W < L and decode_block >= W:
        raise UserError(f"a text of {L} tokens is longer than the window of {W}: decode_block={decode_block} must be "
                        f"less than {W}, {W // 4} say")
    precision = torch.float32 if device.type == "mps" else torch.float64
    grid = rule.grid or partial(mask_rate, schedule)
    seeds = torch.tensor(list(range(B) if seeds is None else seeds), device=device)
    ids, masked, editable = canvas.clone(), canvas == mask, canvas == mask
    place = torch.arange(L, device=device)
    begin = editable.int().argmax(1, keepdim=True)  # first MASK of each row
    number = (place - begin).clamp(min=0) // decode_block  # (B, L) which block a position belongs to
    total = editable.sum(1)
    given_until = torch.where(editable, 0, place + 1).amax(1, keepdim=True)  # all given text ends before this position
    block = torch.full((B,), -1, device=device)  # that each row is writing; L: the row is finished
    over = torch.ones_like(block, dtype=torch.bool)  # whether that block is finished
    k, wanted = torch.zeros_like(block), torch.ones_like(block)  # steps done and steps planned for that block
    confidence, chosen = (torch.ones(B, L, device=device).masked_fill(masked, 0) for _ in range(2))
    top = min(top, mask)
    best = torch.zeros(B, L, top, dtype=torch.long, device=device), torch.zeros(B, L, top, device=device)
    kept, evaluations = blocks.Cache(cache, B, refresh) if cache != "none" else None, 0
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
        u = row_uniforms(seeds, tick, L, precision)
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
            if W < L:
                columns, shift = window_columns(start, decode_block, given_until[rows], W, L, given)
                seen, seen_asked, seen_prompt = (x.gather(1, columns) for x in (seen, seen_asked, seen_prompt))
                start = start - shift
            if kept is None:
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
            tokens = draw(warp(logits[picked], temperature, top_k, top_p), u[1, rows][pick])
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
        yield Step(ids, masked, fresh, remasked, confidence, best if top else None, evaluations, row_evaluations,
                   masked.sum(1) / total.clamp(min=1))


def window_columns(start, length, given_until, W, L, given):
    """Which positions (b, W) of a canvas of L the network sees when it writes blocks of `length` that begin at start
    (b, 1), and how far (b, 1) they are shifted: the block at the right end, and what is before it.

    Where given text comes after the block, as given_until (b, 1) tells, up to a quarter of the window looks ahead. The
    first `given` positions are always in sight.
    """
    end = start + length
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
