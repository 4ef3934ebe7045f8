"""Uniform noise: each token is replaced, with the probability m of its row or block, by one that is
drawn from all V alike. The bound, the reverse step, accept and renoise, and the family.

The closed-form bound and the reverse step want pi, the leave-one-out posterior p(x0_i | xt without
its token i). A network that is trained on the bound says just that, and so does one that is trained
on the cross entropy of the corrupted positions alone: what stands there tells nothing of x0_i. One
that is trained on the cross entropy of all positions says rho = p(x0_i | xt), which accept and
renoise draws from. By Bayes rho_v ~ pi_v q(xt_i | v), and each is turned into the other. (For masks
the two are one.) alpha = 1 - m is the probability to be kept, b = m / V that of each other token.
"""

import torch
import torch.nn.functional as F

from diffusion import SCHEDULES, bos_tokens, mask_ratio, mask_ratio_slope, token_nll
from utils import blocks, draws, importance, kv_cache, self_conditioning
from utils.cli import UserError
from utils.corruption import Corruption, loss_per_pass
from utils.denoisers import Denoiser, MaskNoise, Plain
from utils.policies import UNIFORM_SAMPLERS, USUAL, find_sampler, left_to_right, reverse

# noise level of training and of the bound: what is left out is a millionth of a nat per token
MOST = 1 - 1e-3
LEAST = 1e-6  # noise level at which rho is turned into pi: below, pi would be all error of rho
# least noise level that a network is told of a block. What is beside it and clean is told 0, and
# says something else: nothing, or with ar_weight the next token
LEAST_TOLD = 0.01


def nelbo(logits, xt, x0, level):
    """Integrand, per unit of the noise level m, of the upper bound on -log p(x0): (B, L) nats per
    token, for logits of pi (B, L, V), xt and x0 (B, L) long and levels (B,) or (B, L) in (0, 1).
    The bound is its integral over m from 0 to 1.

    GIDD's form (arXiv:2503.04482): 1 / (alpha V q_i) (KL(q || q_theta) + e^r - r - 1), with
    q = alpha [x0] + b, q_theta = alpha pi + b, i the token of xt and r = log q_i - log q_theta_i.
    Both terms are at least 0, and stable in float32 for m up to MOST, above which their difference
    from 0 is lost.
    """
    V, m = logits.size(-1), level.to(logits.dtype)
    m = m[:, None] if m.dim() == 1 else m
    # b not from alpha, which rounds to 1
    alpha, b, log_keep = 1 - m, (m / V).clamp(min=1e-30), torch.log1p(-m * (1 - 1 / V))
    log_q = logits.log_softmax(-1) + torch.log1p(-m)[..., None]  # of theta
    log_q = torch.logaddexp(log_q, b.log()[..., None])
    at = lambda tokens: log_q.gather(-1, tokens[..., None])[..., 0]
    kl = log_keep.exp() * log_keep + (V - 1) * b * b.log() - alpha * at(x0) - b * log_q.sum(-1)
    q = torch.where(xt == x0, log_keep.exp(), b)
    r = q.log() - at(xt)
    return (kl + r.exp() - r - 1) / (alpha * V * q)


def posterior(pi, xt, m_t, m_s):
    """q(x_s | xt, x0 ~ pi) up to a factor, (N, V), for pi (N, V), xt (N,), noise levels m_t (N,)
    now and m_s (N,) <= m_t: D3PM's posterior (arXiv:2107.03006) with pi put in for x0. With m_s =
    0: p(x0 | xt) of the leave-one-out pi."""
    V, alpha_t, alpha_s = pi.size(-1), (1 - m_t)[:, None], (1 - m_s)[:, None]
    ratio = alpha_t / alpha_s
    same = F.one_hot(xt, V).to(pi.dtype)
    stays = V * alpha_t * pi * same + (ratio - alpha_t) * same
    return stays + (alpha_s - alpha_t) * pi + (1 - ratio) * (1 - alpha_s) / V


def leave_one_out(logits, xt, level):
    """Logits of pi from those of rho: (..., V) for logits (..., V), xt (...) long and noise levels
    (...). By Bayes log pi_v = log rho_v - log q(xt_i | v) + constant."""
    V, m = logits.size(-1), level.clamp(min=LEAST).to(logits.dtype)
    seen = torch.log1p((1 - m) * V / m)[..., None]  # log q(xt_i | xt_i) - log q(xt_i | v)
    return logits.scatter_add(-1, xt[..., None], -seen)


def guessed_levels(wrong, counts, prior):
    """Noise levels that a network which is not told them has in mind at each position of a unit.

    wrong   (..., n) how likely each token is wrong, 1 - rho of what stands there
    counts  (..., n) bool, positions of the unit that may be noise
    prior   a of the law Beta(a, 1) of the levels in training

    The mean of the level given how many of the *other* tokens are replaced; a replaced one is right
    by chance one time in V, for which `wrong` is made up. With the true level in Bayes' rule
    instead, a clean text with a little doubt of it would cost infinitely many nats.
    """
    wrong = wrong * counts
    others = wrong.sum(-1, keepdim=True) - wrong
    return ((prior + others) / (prior + counts.sum(-1, keepdim=True))).clamp(max=MOST)


def wrong_share(logits, xt):
    """How likely each token xt (...) is a replaced one, by the logits of rho (..., V): (...)."""
    V = logits.size(-1)
    wrong = 1 - logits.softmax(-1).gather(-1, xt[..., None])[..., 0]
    return (wrong * V / max(1, V - 1)).clamp(max=1)


def prior_of(schedule):
    """a of the law Beta(a, 1) that has the mean level of the schedule."""
    mean = mask_ratio(schedule, (torch.arange(1000) + 0.5) / 1000).mean().item()
    return mean / (1 - mean)


# --- noise, as the sampling loop sees it (`denoisers.MaskNoise`) ----------------------------------


class UniformNoise:
    """The reverse process: a random token, drawn anew in every step from its posterior.

    Given tokens stay clean beside noisy ones, which training never shows, so a prompted text is off
    by an amount that more steps do not mend (on the toy: total variation .08 to .12 with the
    perfect network); two correctors a step mend most of it (.02 to .05, by the schedule). A
    corrector draws an eighth of the positions anew at the noise level that the canvas has, each
    given all others (Gibbs): that leaves the noisy distribution as it is, exactly so for one
    position at a time.

    says_rho  whether the network says rho, not pi
    prior     of the levels (`prior_of`) for a network that is not told them; None: it is
    """

    carry_over, first_tick = False, 1  # the uniforms of tick 0 are the first noise

    def __init__(self, mask, says_rho=False, prior=None):
        self.mask, self.says_rho, self.prior = mask, says_rho, prior
        self.asks_all = says_rho and prior is not None  # to guess the level

    def fill(self, ids, where, u):
        return torch.where(where, (u * self.mask).long().clamp(max=self.mask - 1), ids)

    def read(self, logits, ids, asked, turn):
        """pi"""
        if not self.says_rho:
            return logits
        xt, level = ids[asked], turn.m_t.expand(ids.shape)[asked]
        if self.prior is not None:
            wrong = wrong_share(logits, xt)
            wrong = wrong.new_zeros(ids.shape).masked_scatter(asked, wrong)
            level = guessed_levels(wrong, asked, self.prior)[asked]
        return leave_one_out(logits, xt, level)

    def belief(self, logits, ids, asked, turn):
        m_t = turn.m_t.expand(ids.shape)[asked]
        p = posterior(logits.softmax(-1).to(m_t.dtype), ids[asked], m_t, torch.zeros_like(m_t))
        return p / p.sum(-1, keepdim=True)

    def reverse(self, p, ids, where, turn):
        m_t, m_s = (level.expand(ids.shape)[where] for level in (turn.m_t, turn.m_s))
        m_t = torch.ones_like(m_t) if turn.corrects else m_t
        return posterior(p.to(m_t.dtype), ids[where], m_t, m_s)

    def left(self, state, turn):
        inside = state.editable & turn.inside
        later = state.masked & ~turn.inside
        noise = turn.m_s[:, 0] * inside.sum(1) + later.sum(1)
        return (noise / state.total.clamp(min=1)).float()


class Renoise(UniformNoise):
    """Accept and renoise (DiffusionGemma, arXiv:2608.00146): tokens are drawn from rho, and what is
    not accepted becomes fresh noise. The noise level is the share of it that stands in the canvas.
    Not the reverse process: in the limit of many steps it is another distribution."""

    def read(self, logits, ids, asked, turn):
        """rho"""
        if self.says_rho:
            return logits
        m_t = turn.m_t.expand(ids.shape)[asked].float()
        return logits - leave_one_out(torch.zeros_like(logits), ids[asked], m_t)

    def belief(self, logits, ids, asked, turn):
        """As it is drawn from, the temperature included: policies go by that (but at 0)."""
        temperature = turn.temperature_at(asked)
        if torch.is_tensor(temperature) or temperature > 0:
            logits = logits / temperature
        return logits.softmax(-1)

    def reverse(self, p, ids, where, turn):
        return p

    def left(self, state, turn):
        return state.masked.sum(1) / state.total.clamp(min=1)


# --- the family -----------------------------------------------------------------------------------

LEFT_TO_RIGHT = "left_to_right"  # the sampler of a network with an autoregressive loss


class Uniform:
    """Diffusion with random tokens instead of MASK. With a block_len each block of a row has a
    noise level of its own, and sees itself and the clean blocks to its left: a canvas that is
    finished before the next begins (DiffusionGemma, arXiv:2608.00146).

    loss_weighting  elbo: the bound, which says pi. full: cross entropy of all positions, which says
                    rho; flat: of the corrupted ones, which says pi. The bound is the same closed
                    form for all. It has its weight at little noise, where the square of the time
                    puts more rows; and as loss it has no gradient where a network is sure that what
                    it sees is right, as large tied embeddings are at the start (tales never got off
                    the ground).
    ar_weight       of the autoregressive cross entropy of the clean half, which is then read from
                    left to right: one network that refines blocks and generates token by token
    """

    exact, procedure, carries_over = False, None, False
    needs = {
        "guidance": (0,),
        "decode_block": (0,),
        "cache": ("auto", "none"),
        "left_to_right": (0,),
        "corruption": ("bernoulli",),
        "diffusion_steps": (0,),
        "loss_weighting": ("elbo", "full", "flat"),
        "complementary": (False,),
        "time_conditioning": ("adaln", "sinusoidal", "none"),
        "schedule": tuple(dict.fromkeys(("poly2", *SCHEDULES))),
        "init": ("normal", "zero"),
    }
    why = {
        "guidance": "only a masked model of the whole window has it",
        "cache": "it keeps keys and values by itself, exact ones",
        "left_to_right": "such a model has no order from left to right, but for --ar_weight",
        "time_sampling": "each block has a noise level of its own (--block_len 0: the window has)",
        "ar_weight": "there is a clean half with blocks only (--block_len 16, say)",
    }

    def __init__(self, cfg):
        self.cfg, self.bos = cfg, bos_tokens(cfg)
        self.block_len = cfg.block_len if cfg.block_len < cfg.seq_len else 0
        self.says_rho = cfg.loss_weighting == "full"
        self.prior = prior_of(cfg.schedule) if cfg.time_conditioning == "none" else None
        self.name = "a model of uniform noise"
        if self.block_len:
            self.name += f" in blocks of {self.block_len}"
            own = {"time_sampling": ("uniform",), "decode_block": (0, self.block_len)}
        else:
            own = {"ar_weight": (0,)}
        # by scripts/lab/ablate.py canvas, for what says rho in blocks
        self.usual = USUAL if self.says_rho and self.block_len else "reverse"
        self.needs, left = self.needs | own, bool(cfg.ar_weight)
        self.samplers = {k: v for k, v in UNIFORM_SAMPLERS.items() if left or k != LEFT_TO_RIGHT}

    def units(self, L):
        """(K, n) of a row of L tokens: what has a noise level of its own, and its positions."""
        n = self.block_len or L - self.bos
        return (L - self.bos) // n, n

    def fit(self, L):
        n = self.block_len
        return self.bos + max(1, (L - self.bos) // n) * n if n else L

    # --- the forward process ---

    def corrupt(self, shape, generator, density=None, given=None):
        B, L = shape
        K, _ = self.units(L)
        t = draws.stratified(B * K, generator).view(B, K)
        t = draws.shuffled(t, generator) if self.block_len else t
        t = importance.inverse_cdf(t, density).clamp(min=1e-9)
        m = mask_ratio(self.cfg.schedule, t).clamp(max=MOST)
        weight = 1 / importance.density_at(t, density)
        if self.cfg.loss_weighting == "elbo":
            weight = weight * mask_ratio_slope(self.cfg.schedule, t)
        whole = self.drawn(L, weight, m, generator, given)
        return whole._replace(conditioned=self_conditioning.drawn(self.cfg, B, generator))

    def drawn(self, L, weight, m, generator, given=None):
        """A Corruption at the noise levels m (B, K); `given` (B, L) bool is not corrupted."""
        level = self.at_positions(m, L)
        masked = torch.rand(level.shape, generator=generator) < level
        noise = torch.randint(2**62, masked.shape, generator=generator)
        fixed = torch.zeros_like(masked).index_fill(1, torch.arange(self.bos), True)
        fixed = fixed if given is None else fixed | given
        masked, noise = masked & ~fixed, noise.masked_fill(fixed, -1)
        return Corruption(masked, self.packed(weight), noise=noise, level=self.packed(m))

    def packed(self, values):
        """(B,) of (B, K) where a row has one unit."""
        return (values if self.block_len else values[:, 0]).float()

    def at_positions(self, values, L):
        """(B, L) of (B, K), or of (B,): 0 at what is in no unit."""
        K, n = self.units(L)
        values = values.view(len(values), K).repeat_interleave(n, 1)
        return F.pad(values, (L - values.size(1), 0))

    def q_sample(self, model, x0, corruption):
        """(xt (B, L), the Corruption on its device)"""
        corruption = corruption.to(x0.device)
        noise = corruption.noise % (model.vocab_size - 1)
        return torch.where(corruption.masked, noise, x0), corruption

    # --- loss and bound ---

    def predict(self, model, x0, corruption):
        """(xt (B, L), logits (B, L, V), those of the clean half or None, levels (B, L))."""
        xt, corruption = self.q_sample(model, x0, corruption)
        L, level = x0.size(1), self.at_positions(corruption.level, x0.size(1))
        more = (corruption.noise >= 0, corruption.conditioned)
        if not self.block_len:
            logits = self_conditioning.ask(self.cfg, model, xt, corruption.level, *more)
            return xt, logits, None, level
        both = bool(self.cfg.ar_weight)
        place = torch.arange(L, device=x0.device)
        index = (torch.arange(len(x0), device=x0.device)[:, None] * 2 * L + place).flatten()
        rest = (self.block_len, self.bos, x0.device, both)
        logits = self_conditioning.ask(
            self.cfg,
            model,
            torch.cat((xt, x0), 1),
            # and the clean half is clean
            F.pad(torch.where(level > 0, level.clamp(min=LEAST_TOLD), 0), (0, L)),
            *more,
            attention=blocks.doubled_attention(L, *rest),
            positions=place.repeat(2),
            select=None if both else index,
        )
        logits = logits.view(len(x0), -1, logits.size(-1))
        return xt, logits[:, :L], logits[:, L:] if both else None, level

    def loss(self, model, x0, corruption, token_nll=token_nll):
        """(B,) nats per token."""
        corruption = corruption.to(x0.device)
        if self.cfg.loss_weighting == "elbo":
            loss, clean = self.closed_form(model, x0, corruption)
        else:
            xt, logits, clean, _ = self.predict(model, x0, corruption)
            loss = token_nll(logits.flatten(0, 1), x0.flatten()).view(x0.shape)
            if self.cfg.loss_weighting == "flat":
                loss = loss.masked_fill(~corruption.masked, 0)
        loss = self.summed(loss, corruption)
        if clean is None:
            return loss
        return loss + self.cfg.ar_weight * self.next_token(clean, x0, corruption, token_nll)

    def summed(self, integrand, corruption):
        """(B,) a row, over L, of what the positions (B, L) cost."""
        weight = self.at_positions(corruption.weight, integrand.size(1))
        return (integrand * weight).masked_fill(corruption.noise < 0, 0).sum(1) / integrand.size(1)

    def closed_form(self, model, x0, corruption):
        """(integrand (B, L) of the bound, logits of the clean half or None)"""
        xt, logits, clean, level = self.predict(model, x0, corruption)
        pi = self.leave_one_out(draws.at_least_float32(logits), xt, level, corruption)
        level = level.masked_fill(corruption.noise < 0, 0.5)  # of what costs nothing
        return nelbo(pi, xt, x0, level), clean

    def leave_one_out(self, logits, xt, level, corruption):
        """Logits of pi, (B, L, V), from those of the network."""
        if not self.says_rho:
            return logits
        if self.prior is not None:
            (K, n), L = self.units(xt.size(1)), xt.size(1)
            units = lambda values: values[:, L - K * n :].reshape(len(xt), K, n)
            wrong, counts = wrong_share(logits, xt), corruption.noise >= 0
            level = guessed_levels(units(wrong), units(counts), self.prior).flatten(1)
            level = F.pad(level, (L - K * n, 0))
        return leave_one_out(logits, xt, level)

    def next_token(self, clean, x0, corruption, token_nll):
        """Cross entropy of each token but the first, given those to the left: (B,), over L."""
        ce = token_nll(clean[:, :-1].flatten(0, 1), x0[:, 1:].flatten()).view(len(x0), -1)
        return ce.masked_fill(corruption.noise[:, 1:] < 0, 0).sum(1) / x0.size(1)

    @torch.no_grad()
    def left_to_right(self, model, x0, given=None):
        """-log p(x0) of a network with an autoregressive loss when it generates token by token,
        (R,) nats per token: exact, but for the first token where nothing is before it."""
        whole = next(self.nelbo_corruptions(x0.shape, 1, given))

        def loss(x0, corruption):
            logits = model(x0, torch.zeros_like(x0[:, 0], dtype=torch.float32), attention="causal")
            return self.next_token(logits, x0, corruption.to(x0.device), token_nll)

        return loss_per_pass(loss, x0, [whole], self.cfg.rows_at_once)[:, 0]

    def nelbo(self, model, x0, passes=1, given=None):
        """Upper bound on -log p(x0), (R, passes) nats per token, the sum of the blocks' where there
        are any. Times are stratified over all rows, and m = t^2, since the integrand grows like
        log(1 / m): nothing is cut off below."""

        def bound(x0, corruption):
            corruption = corruption.to(x0.device)
            return self.summed(self.closed_form(model, x0, corruption)[0], corruption)

        fixed = self.nelbo_corruptions(x0.shape, passes, given)
        return loss_per_pass(bound, x0, fixed, self.cfg.rows_at_once)

    def nelbo_corruptions(self, shape, passes, given=None):
        (R, L), generator = shape, torch.Generator().manual_seed(0)
        units = R * self.units(L)[0]
        for _ in range(passes):
            t = draws.stratified(units, generator)[torch.randperm(units, generator=generator)]
            t = t.view(R, -1)
            yield self.drawn(L, 2 * t, (t**2).clamp(max=MOST), generator, given)

    # --- sampling ---

    def sampler_name(self, how):
        """The name of the sampler that how (SampleConfig) means."""
        return how.sampler or self.usual

    def sampler(self, how):
        """The Sampler that how (SampleConfig) means."""
        sampler = find_sampler(self.sampler_name(how), self.samplers)
        if how.correctors and sampler.policy is not reverse:
            raise UserError(f"correctors={how.correctors}: they are of --sampler reverse")
        return sampler

    def denoiser(self, model, canvas, how, window=None):
        """The canvas, or a block of it, with the noise level that the clock has."""
        (B, L), mask, device = canvas.shape, model.vocab_size - 1, canvas.device
        if self.sampler(how).policy is left_to_right:
            return self.token_denoiser(model, canvas, window)
        kind = Renoise if self.sampler(how).renoises else UniformNoise
        noise = kind(mask, self.says_rho, self.prior)
        memory = self_conditioning.memory(self.cfg, model, canvas)
        if self.block_len:
            return self.block_denoiser(model, canvas, how, window, noise, memory)
        if window and L > window:
            raise UserError(
                "a model of uniform noise generates no more than its window; make --gen-len smaller"
            )
        ask = lambda x, index, seen: model(
            x,
            seen.turn.m_t[seen.rows, 0].float(),
            select=index,
            **self_conditioning.shown(seen.earlier),
        )
        origin = torch.zeros(B, 1, dtype=torch.long, device=device)
        return Denoiser(Plain(ask), noise, canvas, L, origin, memory=memory)

    def block_denoiser(self, model, canvas, how, window, noise, memory):
        """Blocks from left to right, where they were in training."""
        n, bos, causal = self.block_len, self.bos, bool(self.cfg.ar_weight)

        def levels(x, seen):  # what is finished is clean
            inside = torch.arange(x.size(1), device=x.device) >= seen.start
            return torch.where(inside, seen.turn.m_t[seen.rows].float().clamp(min=LEAST_TOLD), 0)

        def ask(x, index, seen):
            place = torch.arange(x.size(1), device=x.device)
            sight = blocks.sight(place[None], x.size(1), n, bos, seen.start if causal else None)
            rest = self_conditioning.shown(seen.earlier)
            return model(x, levels(x, seen), attention=sight, select=index, **rest)

        network = Plain(ask)
        if how.cache == "auto":
            network = kv_cache.Exact(model, canvas, n, bos, levels, causal=causal)
        origin = canvas.new_full((len(canvas), 1), bos)
        return Denoiser(network, noise, canvas, n, origin, window, bos, False, memory)

    def token_denoiser(self, model, canvas, window):
        """Position i reads token i - 1: all stand one position to the right of where they were in
        training, which rotary positions do not see, and nothing stands at the first."""
        mask, zeros = model.vocab_size - 1, lambda x, seen: torch.zeros_like(x, dtype=torch.float32)
        if (canvas[:, 0] == mask).any():
            raise UserError("sampler=left_to_right needs something to begin with; give a --prompt")
        network = kv_cache.Exact(model, canvas, 1, self.bos, zeros, shifted=True, begin=1)
        origin = canvas.new_full((len(canvas), 1), self.bos)
        return Denoiser(network, MaskNoise(mask), canvas, 1, origin, window, self.bos, False)

    # --- for metrics ---

    def probes(self, model, shape, number, generator, given=None):
        """Shares of noise, the same in all blocks."""
        B, L = shape
        K, _ = self.units(L)
        for level in ((i + 0.5) / number for i in range(number)):
            m = torch.full((B, K), level)
            yield level, self.drawn(L, torch.ones(B, K), m, generator, given)

    def log_p(self, model, x0, corruption, index):
        """log p(x0_i | xt) (N, V) of what is corrupted, at its flat positions index (N,)."""
        corruption = corruption.to(x0.device)
        xt, logits, _, level = self.predict(model, x0, corruption)
        logits = draws.at_least_float32(logits)
        logits = self.leave_one_out(logits, xt, level, corruption).flatten(0, 1)[index]
        m = level.flatten()[index]
        p = posterior(logits.softmax(-1), xt.flatten()[index], m, torch.zeros_like(m))
        return (p / p.sum(-1, keepdim=True)).log()
