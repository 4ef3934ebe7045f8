"""Model families beside masked diffusion: blocks, uniform noise, autoregressive; and their names.

A family is an object made from a Config, with the methods and data of `diffusion.Masked`. What
differs between families stands in its class, and nobody else compares their names. To add one,
write its class and an entry in FAMILIES.
"""

from functools import partial

import torch
import torch.nn.functional as F

from config import PRESETS
from diffusion import SCHEDULES, Masked, q_sample
from utils import blocks, kv_cache, self_conditioning
from utils.cli import UserError, check_name, check_needs
from utils.corruption import Corruption, loss_per_pass
from utils.denoisers import Denoiser, MaskNoise, Plain
from utils.policies import SAMPLERS, UNIFORM_SAMPLERS, find_sampler
from utils.uniform import Uniform

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
        "ar_weight": (0,),
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

    def noised_logits(self, model, x0, corruption, index):
        L, masked = x0.size(1), corruption.masked
        xt = q_sample(x0, masked, model.vocab_size - 1)
        return self_conditioning.ask(
            self.cfg,
            model,
            torch.cat((xt, x0), 1),
            F.pad(self.ratios(masked), (0, L)),  # and the clean row is clean
            masked,
            corruption.conditioned,
            attention=blocks.doubled_attention(L, self.block_len, self.bos, x0.device),
            positions=torch.arange(L, device=x0.device).repeat(2),
            select=index // L * 2 * L + index % L,
        )

    def ratios(self, masked):
        """Mask ratio (B, L) of the block of each position."""
        return blocks.mask_ratios(masked, self.block_len, self.bos)

    def logits(self, model, ids, index=None, earlier=None):
        masked, place = ids == model.vocab_size - 1, torch.arange(ids.size(1), device=ids.device)
        sight = blocks.sight(place[None], ids.size(1), self.block_len, self.bos)
        rest = (self.ratios(masked), masked, earlier)
        return self_conditioning.ask(self.cfg, model, ids, *rest, attention=sight, select=index)

    def denoiser(self, model, canvas, how, window=None):
        """In the model's own blocks, which begin where they did in training."""
        mask = model.vocab_size - 1
        if how.cache == "auto":
            levels = lambda x, seen: self.ratios(x == mask)
            rest = (self.block_len, self.bos, levels, self.exact)
            network = kv_cache.Exact(model, canvas, *rest)
        else:
            network = Plain(lambda x, index, seen: self.logits(model, x, index, seen.earlier))
        origin = canvas.new_full((len(canvas), 1), self.bos)
        memory = self_conditioning.memory(self.cfg, model, canvas)
        rest = (self.block_len, origin, window, self.bos, False, memory)
        return Denoiser(network, MaskNoise(mask), canvas, *rest)


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
        "self_conditioning": (0,),
        "ar_weight": (0,),
    }
    why = Blocks.why | dict.fromkeys(
        ("loss_weighting", "time_conditioning", "self_conditioning"),
        "it has no masks and no noise level",
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

    def noised_logits(self, model, x0, corruption, index):
        return self.logits(model, x0, index)

    def logits(self, model, ids, index=None, earlier=None):
        shifted = blocks.shifted(ids, model.vocab_size - 1)
        return model(shifted, None, attention="causal", select=index)

    def probes(self, model, shape, number, generator, given=None):
        """Shares of the row that are still to come."""
        B, L = shape
        for part in torch.arange(self.bos, L).tensor_split(min(number, L - self.bos))[::-1]:
            masked = torch.zeros(B, L, dtype=torch.bool).index_fill(1, part, True)
            masked = masked if given is None else masked & ~given
            yield 1 - part.float().mean().item() / L, Corruption(masked, torch.ones(B))


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
    if name and name not in family.samplers:
        known = ", ".join(family.samplers)
        raise UserError(f"sampler={how.sampler} with {family.name}; known: {known}")


def check_sampling(how):
    """Complain of a sampler or a schedule that no family has."""
    if how.sampler:
        find_sampler(how.sampler, SAMPLERS | UNIFORM_SAMPLERS)
    check_name("schedule", how.schedule, SCHEDULES)


ACCEPTS = "What it would unmask if nothing were is accepted, all else becomes fresh noise."


def show_list():
    """Print the presets, each with its differences from the defaults, the samplers, schedules and
    objectives."""
    for name, settings in PRESETS.items():
        print(f"preset {name}: {', '.join(f'{k}={v}' for k, v in settings.items())}")
    for known, where in ((SAMPLERS, ""), (UNIFORM_SAMPLERS, " under uniform noise")):
        for name, sampler in known.items():
            number = "" if sampler.value is None else f":{sampler.value:g}"
            key = sampler.key.__doc__ if sampler.key else ""
            key = f" Key: {key[0].lower()}{key[1:]}" if key else ""
            what = " ".join(sampler.policy.__doc__.split()) + key
            what += f" {ACCEPTS}" if sampler.renoises else ""
            print(f"sampler{where} {name}{number}: {what}")
    print(f"schedules: {', '.join(SCHEDULES)}")
    print(f"objectives: {', '.join(FAMILIES)}")
