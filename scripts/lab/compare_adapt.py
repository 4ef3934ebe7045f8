"""From autoregressive to masked, as large models are made (DiffuLLaMA, arXiv:2410.17891; Dream,
arXiv:2508.15487): the comparison `adapt` of scripts/lab/ablate.py, which runs it.

Position i of our autoregressive network reads token i - 1, and says token i. A masked network reads
a position in place. So the weights of the former are asked something else, unless the latter reads
the row one to the right too: `Shifted`. And the former never looked to the right: `Annealed` lets
it, more and more.
"""

import os
import tempfile

import torch

import diffusion
from config import Config
from scripts.lab import variants
from scripts.lab.compare_training import run_variant
from utils import cli, runtime

SHARES = (0.25, 0.5, 0.75)  # of the steps that are autoregressive
ANNEALED = 0.3  # share of the masked steps after which all is seen


class Shifted(diffusion.Masked):
    """A masked model whose network reads the row one to the right, a MASK in front, and so needs a
    position more: at each it says the token that it will read at the next."""

    def logits(self, model, ids, index=None, earlier=None):
        B, L = ids.shape
        mask = model.vocab_size - 1
        x = torch.cat((torch.full_like(ids[:, :1], mask), ids), 1)
        if index is None:
            return self.ask(model, x)[:, :-1]
        return self.ask(model, x, index // L * (L + 1) + index % L)

    def ask(self, model, x, index=None):
        return model(x, (x[:, 1:] == model.vocab_size - 1).float().mean(1), select=index)


class Annealed(Shifted):
    """The same, and what is to the right is seen by and by: each pair of positions with a share
    that grows to 1."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.seen, self.steps = 0, max(1, round(ANNEALED * cfg.max_iters))

    def loss(self, *args, **more):
        self.seen += 1
        return super().loss(*args, **more)

    def ask(self, model, x, index=None):
        L, share = x.size(1), self.seen / self.steps
        attention = None
        if model.training and share < 1:
            generator = torch.Generator().manual_seed(self.seen)
            attention = torch.ones(L, L, dtype=torch.bool).tril()
            attention |= torch.rand(L, L, generator=generator) < share
            attention = attention.to(x.device)
        level = (x[:, 1:] == model.vocab_size - 1).float().mean(1)
        return model(x, level, attention=attention, select=index)


OBJECTIVES = {"in place": diffusion.Masked, "shifted": Shifted, "shifted, annealed": Annealed}


def adapt_settings(options):
    """From scratch, in place and shifted; and with each share of the steps autoregressive
    before."""
    found = [(0, "in place"), (0, "shifted")]
    found += [(share, objective) for share in SHARES for objective in OBJECTIVES]
    return [
        {"autoregressive": share, "then": objective, "seed": seed}
        for share, objective in found
        for seed in range(1, options.seeds + 1)
    ]


def measure_adapt(options):
    """(function from a setting to the figures of its run; what they depend on besides). All have
    options.iters steps in all, each of the two parts with its own warm-up and decay."""
    folder, trained = tempfile.TemporaryDirectory(), {}
    base = variants.base_config(options) | {
        "block_len": 0,
        "eval_interval": 10**9,
        "save_interval": 10**9,
    }

    def begun(share, seed):
        """Path of the autoregressive network of that share of the steps."""
        if (share, seed) not in trained:
            changes = {"objective": "ar", "max_iters": round(share * options.iters), "seed": seed}

            def kept(path):
                kept_at = os.path.join(folder.name, f"{share} {seed}.pt")
                os.replace(path, kept_at)
                trained[share, seed] = kept_at
                return {}

            run_variant(cli.merge(Config, base, changes), kept)
        return trained[share, seed]

    def measure(setting):
        share, seed = setting["autoregressive"], setting["seed"]
        steps = options.iters - round(share * options.iters)
        changes = {"objective": setting["then"], "max_iters": steps, "seed": seed}
        changes |= {"init_from": begun(share, seed)} if share else {}
        report, _ = run_variant(cli.merge(Config, base, changes), own=OBJECTIVES)
        return {
            "bound": report["bound_nats_per_token"],
            "se_rows": report["bound_se_rows"],
            "bits_per_byte": report["bound_bits_per_byte"],
            "masked_steps": steps,
        }

    cfg = cli.merge(Config, base)
    common = {"iters": options.iters, "data": cfg.data, "n_layer": cfg.n_layer}
    return measure, common | {
        "n_embd": cfg.n_embd,
        "device": runtime.choose_device(cfg.device).type,
    }
