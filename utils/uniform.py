"""Uniform noise: each token is replaced, with the probability m of its row, by one that is drawn
from all V alike.

The network's output pi, a distribution over tokens at each position, is at its best the
leave-one-out posterior p(x0_i | xt without its token i): that is what the bound's minimum is, and
what the reverse step needs, not p(x0_i | xt). The two differ, unlike for masks. alpha = 1 - m is
the probability to be kept, b = m / V that of each other token.
"""

import torch
import torch.nn.functional as F

# noise level of training and of the bound: what is left out is a millionth of a nat per token
MOST = 1 - 1e-3


def nelbo(logits, xt, x0, level):
    """Integrand, per unit of the noise level m, of the upper bound on -log p(x0): (B, L) nats per
    token, for logits (B, L, V), xt and x0 (B, L) long and levels (B,) in (0, 1). The bound is its
    integral over m from 0 to 1.

    GIDD's form (arXiv:2503.04482): 1 / (alpha V q_i) (KL(q || q_theta) + e^r - r - 1), with
    q = alpha [x0] + b, q_theta = alpha pi + b, i the token of xt and r = log q_i - log q_theta_i.
    Both terms are at least 0, and stable in float32 for m up to MOST, above which their difference
    from 0 is lost.
    """
    V, m = logits.size(-1), level.to(logits.dtype)[:, None]
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


class UniformNoise:
    """Noise as the sampling loop sees it (`denoisers.MaskNoise`): a random token, which is drawn
    anew in every step, from its posterior.

    Given tokens stay clean beside noisy ones, which training never shows, so a prompted text is off
    by an amount that more steps do not mend (on the toy: total variation .08 to .12 with the
    perfect network); two correctors a step mend most of it (.02 to .05, by the schedule). A
    corrector draws an eighth of the positions anew at the noise level that the canvas has, each
    given all others (Gibbs): that leaves the noisy distribution as it is, exactly so for one
    position at a time.
    """

    carry_over, first_tick = False, 1  # the uniforms of tick 0 are the first noise

    def __init__(self, mask):
        self.mask = mask

    def fill(self, ids, where, u):
        return torch.where(where, (u * self.mask).long().clamp(max=self.mask - 1), ids)

    def belief(self, logits, ids, asked, turn):
        m_t = turn.m_t.expand(ids.shape)[asked]
        p = posterior(logits.softmax(-1).to(m_t.dtype), ids[asked], m_t, torch.zeros_like(m_t))
        return p / p.sum(-1, keepdim=True)

    def reverse(self, p, ids, where, turn):
        m_t, m_s = (level.expand(ids.shape)[where] for level in (turn.m_t, turn.m_s))
        m_t = torch.ones_like(m_t) if turn.corrects else m_t
        return posterior(p.to(m_t.dtype), ids[where], m_t, m_s)
