"""Model families beside masked diffusion: blocks, uniform noise, autoregressive; and their names.

A family is an object made from a Config, with the methods and data of `diffusion.Masked`. What
differs between families stands in its class, and nobody else compares their names. To add one,
write its class and an entry in FAMILIES.
"""

from functools import partial

import torch
import torch.nn.functional as F

from config import PRESETS
from diffusion import SCHEDULES, Masked, bos_tokens, mask_ratio, mask_ratio_slope, q_sample
from utils import blocks, draws, importance, kv_cache, uniform
from utils.cli import UserError, check_name, check_needs
from utils.corruption import Corruption, loss_per_pass
from utils.denoisers import Denoiser, MaskNoise, Plain
from utils.policies import SAMPLERS, UNIFORM_SAMPLERS, find_sampler

# what families that generate from left to right need when they do
LEFT_TO_RIGHT = {"guidance": (0,), "correctors": (0,), "cache": ("auto", "none")}
NOT_ALL_AT_ONCE = {
    "guidance": "only a masked model of the whole window has it",
    "cache": "it keeps keys and values by itself, exact ones",
}


def whole_window(cfg):
    """What families without blocks need: a block as long as the window is none."""
    return {"block_len": (0, cfg.seq_len)}


class Blocks(Masked):
    """Block diffusion (BD3-LM, arXiv:2503.09573): each block of a row is masked at a ratio of its
    own, and sees itself and the clean blocks to its left. In training the clean row stands beside
    the corrupted one (`blocks.doubled_mask`)."""

    needs = LEFT_TO_RIGHT | {
        "corruption": ("count",),
        "complementary": (False,),
        "loss_weighting": ("flat", "elbo", "clip", "pooled"),
        "time_sampling": ("uniform",),
    }
    why = (
        Masked.why
        | NOT_ALL_AT_ONCE
        | dict.fromkeys(
            ("corruption", "complementary", "loss_weighting", "time_sampling"),
            "each block has a mask ratio of its own (--block_len 0: one for the window)",
        )
    )

    def __init__(self, cfg):
        super().__init__(cfg)
        self.block_len = cfg.block_len
        self.name = f"a model of blocks of {self.block_len} tokens"
        self.needs = self.needs | {"decode_block": (0, self.block_len)}

    def units(self, L):
        return (L - self.bos) // self.block_len, self.block_len

    def unit_of(self, L, device):
        return blocks.block_ids(L, self.block_len, self.bos, device).clamp(min=0)

    def fit(self, L):
        return self.bos + max(1, self.units(L)[0]) * self.block_len

    def noised_logits(self, model, x0, masked, index):
        L, xt = x0.size(1), q_sample(x0, masked, model.vocab_size - 1)
        ratio = blocks.mask_ratios(masked, self.block_len, self.bos)
        return model(
            torch.cat((xt, x0), 1),
            F.pad(ratio, (0, L)),  # and the clean row is clean
            attention=blocks.doubled_attention(L, self.block_len, self.bos, x0.device),
            positions=torch.arange(L, device=x0.device).repeat(2),
            select=index // L * 2 * L + index % L,
        )

    def logits(self, model, ids, index=None):
        ids_of = blocks.block_ids(ids.size(1), self.block_len, self.bos, ids.device)
        ratio = blocks.mask_ratios(ids == model.vocab_size - 1, self.block_len, self.bos)
        return model(ids, ratio, attention=ids_of[None] <= ids_of[:, None], select=index)

    def denoiser(self, model, canvas, how, window=None):
        """In the model's own blocks, which begin where they did in training."""
        B, device = len(canvas), canvas.device
        if how.cache == "auto":
            network = kv_cache.Exact(model, B, self.block_len, self.bos, self.exact, device)
        else:
            network = Plain(lambda x, index, seen: self.logits(model, x, index))
        origin = torch.full((B, 1), self.bos, device=device)
        return Denoiser(
            network,
            MaskNoise(model.vocab_size - 1),
            canvas,
            self.block_len,
            origin,
            window,
            self.bos,
            sees_right=False,
        )


class Autoregressive(Blocks):
    """The same transformer from left to right, to compare with: blocks of one token, which is
    always masked. Position i reads token i - 1 (the first reads MASK) and what is to the left, so
    all L tokens of a row are predicted, as in diffusion; and the bound is exact."""

    name, exact, block_len, procedure = "an autoregressive model", True, 1, "left to right"
    needs = LEFT_TO_RIGHT | {
        "decode_block": (0, 1),
        "block_len": (0,),
        "corruption": ("count", "bernoulli"),
        "loss_weighting": ("flat", "elbo", "clip"),
        "complementary": (False,),
        "time_conditioning": ("none",),
        "time_sampling": ("uniform",),
    }
    why = Blocks.why | dict.fromkeys(
        ("loss_weighting", "time_conditioning"), "it has no masks and no noise level"
    )

    def __init__(self, cfg):
        Masked.__init__(self, cfg)
        self.needs = self.needs | whole_window(cfg)

    def fit(self, L):
        return L

    def unit_of(self, L, device):
        return None

    def corrupt(self, shape, generator=None, density=None, given=None):
        B, L = shape
        masked, most = (torch.arange(L) >= self.bos).repeat(B, 1), None
        if given is not None:  # pieces of one size, as `split` makes them of the others
            masked, most = masked & ~given, torch.full((B,), L - self.bos)
        return Corruption(masked, torch.ones(B), most)

    def nelbo(self, model, x0, passes=1, given=None):
        """-log p(x0) itself, (R, 1) nats per token."""
        whole = self.corrupt(x0.shape, given=given)
        loss, rows_at_once = partial(self.weighted_ce, model), self.cfg.rows_at_once
        return loss_per_pass(loss, x0, [whole], rows_at_once)

    def noised_logits(self, model, x0, masked, index):
        return self.logits(model, x0, index)

    def logits(self, model, ids, index=None):
        shifted = blocks.shifted(ids, model.vocab_size - 1)
        return model(shifted, None, attention="causal", select=index)

    def probes(self, model, shape, number, generator, given=None):
        """Shares of the row that are still to come."""
        B, L = shape
        for part in torch.arange(self.bos, L).tensor_split(min(number, L - self.bos))[::-1]:
            masked = torch.zeros(B, L, dtype=torch.bool).index_fill(1, part, True)
            masked = masked if given is None else masked & ~given
            yield 1 - part.float().mean().item() / L, Corruption(masked, torch.ones(B))


class Uniform:
    """Diffusion with random tokens instead of MASK (utils/uniform.py). They do not show the noise
    level, so the network is told it. The bound has its weight at little noise, where the square of
    the time puts more rows; and it has no gradient where a network is sure that what it sees is
    right, as large tied embeddings are at the start (tales never got off the ground)."""

    name, exact, block_len, samplers = "a model of uniform noise", False, 0, UNIFORM_SAMPLERS
    procedure = "from uniform noise"
    needs = {
        "guidance": (0,),
        "decode_block": (0,),
        "cache": ("auto", "none"),
        "left_to_right": (0,),
        "block_len": (0,),
        "corruption": ("bernoulli",),
        "diffusion_steps": (0,),
        "loss_weighting": ("elbo",),
        "complementary": (False,),
        "time_conditioning": ("adaln", "sinusoidal"),
        "schedule": tuple(dict.fromkeys(("poly2", *SCHEDULES))),
        "init": ("normal", "zero"),
    }
    why = NOT_ALL_AT_ONCE | {
        "time_conditioning": "random tokens do not show the noise level, which it must be told",
        "left_to_right": "such a model has no order from left to right",
    }

    def __init__(self, cfg):
        self.cfg, self.bos = cfg, bos_tokens(cfg)
        self.needs = self.needs | whole_window(cfg)

    def fit(self, L):
        return L

    def corrupt(self, shape, generator, density=None, given=None):
        B, L = shape
        t = draws.stratified(B, generator)
        t = importance.inverse_cdf(t, density).clamp(min=1e-9)
        m = mask_ratio(self.cfg.schedule, t).clamp(max=uniform.MOST)
        masked = torch.rand(B, L - self.bos, generator=generator) < m[:, None]
        masked = F.pad(masked, (self.bos, 0))
        weight = mask_ratio_slope(self.cfg.schedule, t) / importance.density_at(t, density)
        return self.pack(masked, weight, m, generator, given)

    def pack(self, masked, weight, m, generator, given=None):
        """A Corruption at the noise levels m (B,); `given` (B, L) bool is not corrupted."""
        noise = torch.randint(2**62, masked.shape, generator=generator)
        if given is not None:
            masked, noise = masked & ~given, noise.masked_fill(given, -1)
        return Corruption(masked, weight.float(), noise=noise, level=m.float())

    def loss(self, model, x0, corruption, token_nll=None):
        """The closed-form bound (`uniform.nelbo`), (B,) nats per token."""
        xt, corruption = self.q_sample(model, x0, corruption)
        logits = draws.at_least_float32(model(xt, corruption.level))
        integrand = uniform.nelbo(logits, xt, x0, corruption.level).masked_fill(
            corruption.noise < 0, 0
        )
        return integrand[:, self.bos :].sum(1) * corruption.weight / x0.size(1)

    def q_sample(self, model, x0, corruption):
        """(xt (B, L), the Corruption on its device)"""
        corruption = corruption.to(x0.device)
        return torch.where(
            corruption.masked, corruption.noise % (model.vocab_size - 1), x0
        ), corruption

    def nelbo(self, model, x0, passes=1, given=None):
        """Upper bound on -log p(x0), (R, passes) nats per token. Times are stratified over all
        rows, and m = t^2, since the integrand grows like log(1 / m): nothing is cut off below."""
        fixed = self.nelbo_corruptions(x0.shape, passes, given)
        return loss_per_pass(partial(self.loss, model), x0, fixed, self.cfg.rows_at_once)

    def nelbo_corruptions(self, shape, passes, given=None):
        R, generator = shape[0], torch.Generator().manual_seed(0)
        for _ in range(passes):
            t = draws.stratified(R, generator)[torch.randperm(R, generator=generator)]
            m = (t**2).clamp(max=uniform.MOST)
            masked = torch.rand(shape, generator=generator) < m[:, None]
            masked[:, : self.bos] = False
            yield self.pack(masked, 2 * t, m, generator, given)

    def sampler(self, how):
        """The reverse process, unless how names another that it has."""
        known = how.sampler.partition(":")[0] in self.samplers
        return find_sampler(how.sampler if known else "reverse", self.samplers)

    def denoiser(self, model, canvas, how, window=None):
        """The whole canvas at once, with the noise level that the clock has."""
        B, L = canvas.shape
        if window and L > window:
            raise UserError(
                "a model of uniform noise generates no more than its window; make --gen-len smaller"
            )
        network = Plain(
            lambda x, index, seen: model(x, seen.turn.m_t[seen.rows, 0].float(), select=index)
        )
        origin = torch.zeros(B, 1, dtype=torch.long, device=canvas.device)
        return Denoiser(network, uniform.UniformNoise(model.vocab_size - 1), canvas, L, origin)

    def probes(self, model, shape, number, generator, given=None):
        B, L = shape
        for level in ((i + 0.5) / number for i in range(number)):
            masked = F.pad(torch.rand(B, L - self.bos, generator=generator) < level, (self.bos, 0))
            masked = masked if given is None else masked & ~given
            noise = torch.randint(model.vocab_size - 1, shape, generator=generator)
            yield (
                level,
                Corruption(masked, torch.ones(B), noise=noise, level=torch.full((B,), level)),
            )

    def log_p(self, model, x0, corruption, index):
        """log p(x0_i | xt) (N, V) of what is corrupted, at its flat positions index (N,)."""
        xt, corruption = self.q_sample(model, x0, corruption)
        logits = draws.at_least_float32(model(xt, corruption.level, select=index))
        m = corruption.level[0].expand(len(index))
        p = uniform.posterior(logits.softmax(-1), xt.flatten()[index], m, torch.zeros_like(m))
        return (p / p.sum(-1, keepdim=True)).log()


# --objective -> its class; with a block_len, that of "masked" is Blocks
FAMILIES = {"masked": Masked, "uniform": Uniform, "ar": Autoregressive}


def family_of(cfg):
    """The family of a model that is trained with cfg."""
    check_name("objective", cfg.objective, FAMILIES)
    kind = FAMILIES[cfg.objective]
    return Blocks(cfg) if kind is Masked and cfg.block_len not in (0, cfg.seq_len) else kind(cfg)


def checked(cfg):
    """`family_of` a Config, after complaining of what it cannot have."""
    check_name("schedule", cfg.schedule, SCHEDULES)
    family = family_of(cfg)
    check_needs(family, cfg)
    return family


def check_sampler(family, how):
    """Complain of a sampler that the family does not have."""
    name = how.sampler.partition(":")[0]
    if name not in family.samplers:
        known = ", ".join(family.samplers)
        own = "which has one of its own (--steps and --correctors say how long it works)"
        raise UserError(
            f"sampler={how.sampler} with {family.name}"
            + (f", {own}" if len(family.samplers) == 1 else f"; known: {known}")
        )


def check_sampling(how):
    """Complain of a sampler or a schedule that no family has."""
    find_sampler(how.sampler, SAMPLERS | UNIFORM_SAMPLERS)
    check_name("schedule", how.schedule, SCHEDULES)


def show_list():
    """Print the presets, each with its differences from the defaults, the samplers, schedules and
    objectives."""
    for name, settings in PRESETS.items():
        print(f"preset {name}: {', '.join(f'{k}={v}' for k, v in settings.items())}")
    for name, sampler in SAMPLERS.items():
        number = "" if sampler.value is None else f":{sampler.value:g}"
        key = sampler.key.__doc__ if sampler.key else ""
        key = f" Key: {key[0].lower()}{key[1:]}" if key else ""
        print(f"sampler {name}{number}: {' '.join(sampler.policy.__doc__.split())}{key}")
    print(f"samplers under uniform noise: {', '.join(UNIFORM_SAMPLERS)}")
    print(f"schedules: {', '.join(SCHEDULES)}")
    print(f"objectives: {', '.join(FAMILIES)}")
