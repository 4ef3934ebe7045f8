"""The yardstick: the micro-dLLMs' published sampler, as it is. (Their recipe is config.MICRO.)"""

import math

import torch


@torch.no_grad()
def sampler(model, canvas, steps=101, seed=0):
    """The micro-dLLMs' sampler as published, the yardstick of `sample`: the ids (B, L) that it ends
    with.

    Each step computes all positions, draws a token everywhere, keeps the surest by the probability
    of the token drawn and masks the rest; a last pass takes the likeliest token at every position.
    (Their network can draw MASK; ours has no logit for it, and is told the true mask ratio.)
    """
    mask, free = model.vocab_size - 1, canvas == model.vocab_size - 1
    ids, total = canvas.clone(), free.sum(1)
    generator = torch.Generator(canvas.device).manual_seed(seed)
    for t in range(steps - 1, 0, -1):
        p = model(ids, (ids == mask).float().mean(1)).float().softmax(-1)
        tokens = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view_as(ids)
        sure = p.gather(2, tokens[..., None])[..., 0].masked_fill(~free, 2)
        share = 1 - math.cos(math.pi / 2 * (t - 1) / (steps - 1))  # their cosine schedule
        masked = sure.argsort(1).argsort(1) < (share * total).long()[:, None]
        ids = torch.where(free, torch.where(masked, mask, tokens), canvas)
    return torch.where(free, model(ids, (ids == mask).float().mean(1)).argmax(-1), canvas)
