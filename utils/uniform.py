"""Uniform noise: each token is replaced, with the chance m of its row, by one that is drawn from all V alike.

The network's output pi, a distribution over tokens at each position, is at its best the leave-one-out posterior
p(x0_i | xt without its token i): that is what the bound's minimum is, and what the reverse step needs, not p(x0_i | xt).
The two differ, unlike for masks. alpha = 1 - m is the chance to be kept, b = m / V that of each other token.
"""
import torch
import torch.nn.functional as F

from utils import draws, rules


MOST = 1 - 1e-3  # noise level of training and of the bound: what is left out is about a millionth of a nat a token


def nelbo(logits, xt, x0, level):
    """Integrand, per unit of the noise level m, of the upper bound on -log p(x0): (B, L) nats a token, for logits
    (B, L, V), xt and x0 (B, L) long and levels (B,) in (0, 1). The bound is its integral over m from 0 to 1.

    GIDD's form (arXiv:2503.04482): 1 / (alpha V q_i) (KL(q || q_theta) + e^r - r - 1), with q = alpha [x0] + b, q_theta =
    alpha pi + b, i the token of xt and r = log q_i - log q_theta_i. Both terms are at least 0, and stable in float32 for m up
    to MOST, above which their difference from 0 is lost.
    """
    V, m = logits.size(-1), level.to(logits.dtype)[:, None]
    alpha, b, log_keep = 1 - m, (m / V).clamp(min=1e-30), torch.log1p(-m * (1 - 1 / V))  # b not from alpha, which rounds to 1
    log_q = torch.logaddexp(logits.log_softmax(-1) + torch.log1p(-m)[..., None], b.log()[..., None])  # of theta
    at = lambda tokens: log_q.gather(-1, tokens[..., None])[..., 0]
    kl = log_keep.exp() * log_keep + (V - 1) * b * b.log() - alpha * at(x0) - b * log_q.sum(-1)
    q = torch.where(xt == x0, log_keep.exp(), b)
    r = q.log() - at(xt)
    return (kl + r.exp() - r - 1) / (alpha * V * q)


def posterior(pi, xt, m, there):
    """q(x_s | xt, x0 ~ pi) up to a factor, (N, V), for pi (N, V), xt (N,), noise levels m (N,) now and `there` (N,) <= m:
    D3PM's posterior (arXiv:2107.03006) with pi put in for x0. With there = 0: p(x0 | xt) of the leave-one-out pi."""
    V, alpha, after = pi.size(-1), (1 - m)[:, None], (1 - there)[:, None]
    ratio = alpha / after
    same = F.one_hot(xt, V).to(pi.dtype)
    return V * alpha * pi * same + (ratio - alpha) * same + (after - alpha) * pi + (1 - ratio) * (1 - after) / V


@torch.no_grad()
def sample(model, canvas, *, steps, grid, seeds, warp, correctors=0, top=0):
    """Ancestral sampling from uniform noise for `diffusion.sample`, whose arguments these are; yields a `rules.Step` after
    each network evaluation. The first shows all tokens, later ones those that changed.

    Given tokens stay clean beside noisy ones, which training never shows, so a prompted text is off by an amount that more
    steps do not mend (on the toy: total variation .08 to .12 with the perfect network); two correctors a step mend most of
    it (.02 to .05, by the schedule).

    grid        noise level over time 1 -> 0
    warp        function of logits: the distribution to draw from
    correctors  sweeps after each step: an eighth of the positions at random, each drawn anew given all others (Gibbs).
                That leaves the noisy distribution as it is, exactly so for one position at a time
    """
    (B, L), device, V = canvas.shape, canvas.device, model.vocab_size - 1
    precision = torch.float32 if device.type == "mps" else torch.float64
    editable = canvas == V
    total = editable.sum(1)
    uniforms = lambda tick: draws.row_uniforms(seeds, tick, L, precision)
    start = (uniforms(0)[0] * V).long().clamp(max=V - 1)
    ids, rows = torch.where(editable, start, canvas), (total > 0).nonzero()[:, 0]
    evaluations, tick = torch.zeros(B, dtype=torch.long, device=device), 1
    confidence = torch.ones(B, L, device=device).masked_fill(editable, 0)
    best = torch.zeros(B, L, top, dtype=torch.long, device=device), torch.zeros(B, L, top, device=device)
    nothing = torch.zeros_like(editable)
    if not len(rows):
        return
    steps = steps or L  # not of the tokens to write: a row must not depend on its batch
    levels = grid(torch.linspace(1, 0, steps + 1, dtype=precision, device=device))
    for k in range(steps):
        here, there = levels[k], levels[k + 1]
        for sweep in range(1 + correctors * bool(there > 0)):
            u = uniforms(tick)
            asked = editable[rows]
            if sweep:  # at the level that the step has reached
                here, number = there, -(-total[rows, None] // 8)
                asked = asked & (u[0, rows].masked_fill(~asked, 2).argsort(1).argsort(1) < number)
            logits = model(ids[rows], here.float().expand(len(rows)), select=asked.flatten().nonzero()[:, 0])
            pi, now = warp(draws.at_least_float32(logits)).to(precision), ids[rows][asked]
            level = here.expand(len(now))
            p = (1 - level)[:, None] * pi + level[:, None] / V if sweep else posterior(pi, now, level, there.expand(len(now)))
            clean = posterior(pi, now, level, torch.zeros_like(level))  # p(x0 | xt), for viewers
            clean = clean / clean.sum(-1, keepdim=True)
            before = ids.clone()
            ids[rows] = ids[rows].masked_scatter(asked, draws.draw(p, u[1, rows][asked]))
            evaluations[rows], tick = evaluations[rows] + 1, tick + 1
            confidence[rows] = confidence[rows].masked_scatter(asked, rules.max_probability(clean).float())
            if top:
                likeliest = clean.topk(top)
                for old, new in zip(best, (likeliest.indices, likeliest.values.float())):
                    old[rows] = old[rows].masked_scatter(asked[..., None], new)
            fresh = ids != before if tick > 2 else editable  # in the first step all appear
            yield rules.Step(ids, nothing, fresh, nothing, confidence, best if top else None, int(evaluations.max()), evaluations,
                             there.float().expand(B))
