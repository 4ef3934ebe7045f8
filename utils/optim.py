"""Optimizers and the learning rate over a run."""

import math

import torch


def orthogonalise(g, dtype, steps=5):
    """Roughly U V^T of each matrix U S V^T in g (n, rows, columns): Newton-Schulz, the coefficients
    of Jordan 2024.

    The singular values end near 1, between about 0.7 and 1.2, which trains as well as exactly 1 and
    costs less.
    """
    x = g.to(dtype)
    tall = x.size(1) > x.size(2)
    x = x.mT.contiguous() if tall else x  # products of a transposed view are half as fast on a CPU
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon's update with all matrices of a shape orthogonalised at once, and in float32
    for runs in float32: bfloat16 turns their last digit into the third. `scripts/lab/bench.py
    train` times the two, a test compares their steps.

    params are matrices; lr is scaled by sqrt(max(1, rows / columns)), momentum is Nesterov's, less
    than Jordan's 0.95 because runs of some hundred steps are better with less; dtype is that of the
    orthogonalisation.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for params in shapes.values():
                self._move(params, group)

    def _move(self, params, group):
        """Step of `params`, all of one shape, of the group."""
        (rows, columns), lr, momentum = params[0].shape, group["lr"], group["momentum"]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        grads = [p.grad for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        nesterov = torch.stack(torch._foreach_lerp(grads, buffers, momentum))
        updates = list(orthogonalise(nesterov, self.dtype).unbind())
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-lr * math.sqrt(max(1, rows / columns)))


def make_optimizers(model, cfg, dtype=torch.float32):
    """List of optimizers. Muon (Jordan 2024) moves the block matrices, each step orthogonalised, in
    bfloat16 if that is the run's dtype; AdamW moves embeddings, head and vectors. Each group
    remembers its full learning rate in "peak"."""
    matrices = [
        p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")
    ]
    if cfg.optimizer == "adamw":
        matrices = []
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    decayed, plain = [p for p in others if p.ndim == 2], [p for p in others if p.ndim != 2]
    groups = [
        dict(params=decayed, weight_decay=cfg.weight_decay),
        dict(params=plain, weight_decay=0.0),
    ]
    optimizers = [
        torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True
        )
    ]
    if matrices:
        optimizers.append(
            Muon(
                matrices,
                lr=cfg.muon_lr,
                weight_decay=cfg.weight_decay,
                dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
            )
        )
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


# of each parameter
STATE = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}


def load(optimizer, saved, begun):
    """Put what the state dict `saved` has averaged into `optimizer`, which keeps its own settings:
    a resumed run may have other learning rates. A ValueError where it is of other parameters, or
    lacks some though the run has `begun`, which torch would notice at the next step or never."""
    if begun and set(saved["state"]) != set(
        range(sum(len(group["params"]) for group in optimizer.param_groups))
    ):
        raise ValueError("its optimizer has not averaged the gradients of each parameter")
    optimizer.load_state_dict(
        {"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]}
    )
    for parameter, state in optimizer.state.items():
        if state.keys() != STATE[type(optimizer).__name__] or not all(
            value.is_floating_point() and value.shape == (() if name == "step" else parameter.shape)
            for name, value in state.items()
        ):
            raise ValueError(
                f"the averages of its optimizer, {', '.join(map(str, state))}, are not those of "
                "its network"
            )


@torch.no_grad()
def update_average(average, model, decay, step):
    """Move the weights of `average` towards those of `model` after step (from 0), exponentially, in
    float32.

    The decay is less at first, (1 + step) / (10 + step), so that the random beginning is soon
    forgotten. (Not torch's AveragedModel: it counts on the GPU, and a decay that depends on the
    count would wait for it at every step.)
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)


def lr_scale(cfg, step, progress):
    """Factor on every learning rate at `step` (from 0); progress: fraction of the run that is
    done."""
    warmup = min(1.0, (step + 1) / max(1, cfg.warmup_iters))
    if cfg.lr_decay == "constant" or not cfg.decay_share:
        return warmup
    left = min(1.0, max(0.0, (1 - progress) / cfg.decay_share))
    return warmup * (left if cfg.lr_decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))
