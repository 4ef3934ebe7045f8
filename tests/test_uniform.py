"""Uniform noise against exact answers: the bound, what a network says, blocks, self-conditioning,
accept and renoise.

Expected values are those of the design's mathematics document, section 5, item 7.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import toy
from conftest import load
from test_maths import ENTROPY, empirical, total_variation
from toy import MASK, SEQUENCES, L, P, V, code, sample, settings

import diffusion
from config import SampleConfig
from model import Transformer
from utils import draws, repair, uniform
from utils.cli import UserError
from utils.families import checked, family_of
from utils.runtime import generator

ROW = code(torch.tensor([0, 1, 2, 0])).item()


class LeaveOneOut:
    """The perfect network under uniform noise, p(x0_i | xt without its token i); blurred, or the
    full posterior instead."""

    vocab_size = V + 1

    def __init__(self, blur=0.0, full=False):
        self.blur, self.full = blur, full

    def posterior(self, level):
        """(81, 4, 3) for every xt at one noise level (float)."""
        # (x0, xt) chance of a token
        keep = (1 - level) * torch.eye(V, dtype=torch.float64) + level / V
        # (4, 81 x0, 81 xt)
        each = torch.stack([keep[SEQUENCES[:, i]][:, SEQUENCES[:, i]] for i in range(L)])
        one_hot = torch.nn.functional.one_hot(SEQUENCES, V).double()
        out = []
        for i in range(L):
            chance = P[:, None] * (
                each.prod(0)
                if self.full
                else torch.stack([each[j] for j in range(L) if j != i]).prod(0)
            )
            p = chance.T @ one_hot[:, i]
            out.append(p / p.sum(1, keepdim=True))
        return (1 - self.blur) * torch.stack(out, 1) + self.blur / V

    def __call__(self, ids, noise_level, select=None):
        assert (noise_level == noise_level[0]).all(), "all rows of a test are at one level"
        logits = self.posterior(noise_level[0].double()).log()[code(ids)]
        return logits if select is None else logits.flatten(0, 1)[select]


def exact_uniform_nelbo(model, nodes=32, rows=range(81)):
    """(len(rows),) nats: all xt enumerated, the integral over m = s^3 by Gauss-Legendre."""
    s, weights = np.polynomial.legendre.leggauss(nodes)
    total = [torch.zeros((), dtype=torch.float64) for _ in rows]
    for s, w in zip(torch.tensor(s / 2 + 0.5), torch.tensor(weights / 2)):
        m = s**3
        keep = (1 - m) * torch.eye(V, dtype=torch.float64) + m / V
        # (81 x0, 81 xt)
        chance = torch.stack([keep[SEQUENCES[:, i]][:, SEQUENCES[:, i]] for i in range(L)]).prod(0)
        logits = model(SEQUENCES, m.expand(81))
        for number, x in enumerate(rows):
            x0 = SEQUENCES[x].expand(81, L)
            total[number] = (
                total[number]
                + 3
                * s**2
                * w
                * (chance[x] * uniform.nelbo(logits, SEQUENCES, x0, m.expand(81)).sum(1)).sum()
            )
    return torch.stack(total)


def test_uniform_bound_of_the_perfect_network_is_the_likelihood():
    assert (exact_uniform_nelbo(LeaveOneOut()) + P.log()).abs().max() < 1e-7


def test_uniform_bound_of_imperfect_networks():
    assert (P * exact_uniform_nelbo(LeaveOneOut(blur=0.2))).sum().item() == pytest.approx(
        3.7400459560, abs=1e-7
    )
    gap = (P * exact_uniform_nelbo(LeaveOneOut(full=True))).sum().item() - ENTROPY
    assert gap == pytest.approx(1.88, abs=0.01), "the full posterior is not what the bound wants"


def test_the_published_forms_of_the_uniform_bound_are_one():
    """UDLM's form (arXiv:2412.10193), written as in the mathematics document, against GIDD's."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(50, 6, 7, generator=generator, dtype=torch.float64)
    x0, xt = torch.randint(7, (2, 50, 6), generator=generator)
    m = torch.rand(50, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    alpha, N = (1 - m)[:, None, None], 7
    bar = N * alpha * torch.nn.functional.one_hot(x0, N) + 1 - alpha
    theta = N * alpha * logits.softmax(-1) + 1 - alpha
    at = lambda table: table.gather(-1, xt[..., None])
    udlm = (1 / (N * alpha)) * (
        N / at(theta)
        - N / at(bar)
        + (bar / at(bar) * ((bar * at(theta)) / (at(bar) * theta)).log()).sum(-1, keepdim=True)
    )
    torch.testing.assert_close(
        uniform.nelbo(logits, xt, x0, m), udlm[..., 0], atol=1e-10, rtol=1e-10
    )
    single = uniform.nelbo(logits.float(), xt, x0, m.float())
    torch.testing.assert_close(single.double(), udlm[..., 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("m", (1e-30, 1e-12, 1e-9, 2e-8, 1e-6, 1e-4, 1e-2, 0.5, 0.99, uniform.MOST))
def test_the_uniform_bound_is_stable_in_float32(m):
    """At every noise level that is drawn; where a token was changed its weight is 1 / m."""
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(40, 5, 65, generator=generator, dtype=torch.float64)
    x0, xt = torch.randint(65, (2, 40, 5), generator=generator)
    xt[:20] = x0[:20]
    level = torch.full((40,), m, dtype=torch.float64)
    single = uniform.nelbo(logits.float(), xt, x0, level.float())
    double = uniform.nelbo(logits, xt, x0, level)
    noise = 3e-3 if m > 0.9 else 1e-4  # there it is nearly zero
    torch.testing.assert_close(single.double(), double, rtol=2e-3, atol=noise)
    logits = logits.float().requires_grad_()
    uniform.nelbo(logits, xt, x0, level.float()).sum().backward()
    assert logits.grad.isfinite().all() and double.min() >= -1e-9


def test_forward_and_posterior_of_uniform_noise():
    """Item 2: the noise keeps a token with chance alpha + b, and q(xs | xt, x0) is Bayes' rule and
    sums to 1."""
    n = 4
    for s, t in ((0.0, 0.4), (0.2, 0.7), (0.5, 1.0)):
        q = lambda level: (1 - level) * torch.eye(n, dtype=torch.float64) + level / n  # (from, to)
        step = 1 - (1 - t) / (1 - s)
        for x0, xt in itertools.product(range(n), repeat=2):
            bayes = q(s)[x0] * q(step)[:, xt] / (q(s) @ q(step))[x0, xt]
            pi = torch.nn.functional.one_hot(torch.tensor([x0]), n).double()
            found = uniform.posterior(
                pi, torch.tensor([xt]), *torch.tensor([[t], [s]], dtype=torch.float64)
            )[0]
            normal = n * (1 - t) * (x0 == xt) + t  # the denominator of the mathematics document
            assert found.sum().item() == pytest.approx(normal, abs=1e-12)
            torch.testing.assert_close(found / normal, bayes, atol=1e-12, rtol=0)


def uniform_law(model, T):
    """Exact law (81,) of ancestral sampling on the linear grid."""
    law = torch.full((81,), 1 / 81, dtype=torch.float64)
    for k in range(T, 0, -1):
        m, s = (torch.full((81 * L,), x / T, dtype=torch.float64) for x in (k, k - 1))
        pi = model(SEQUENCES, m[:81]).softmax(-1).flatten(0, 1)
        q = uniform.posterior(pi, SEQUENCES.flatten(), m, s).view(81, L, V)
        q = q / q.sum(-1, keepdim=True)
        move = torch.stack([q[:, i][:, SEQUENCES[:, i]] for i in range(L)]).prod(0)  # (from, to)
        law = law @ move
    return law


@pytest.mark.parametrize(
    "T, expected",
    ((2, 0.27334), (4, 0.13945), (8, 0.065789), (16, 0.031262), (32, 0.015193), (64, 0.007478)),
)
def test_law_of_uniform_sampling(T, expected):
    assert total_variation(uniform_law(LeaveOneOut(), T), P) == pytest.approx(expected, abs=1e-5)
    if T == 64:
        assert total_variation(uniform_law(LeaveOneOut(full=True), T), P) == pytest.approx(
            0.287, abs=1e-3
        )


@pytest.mark.parametrize("T", (1, 2, 4))
def test_uniform_sampler_follows_its_law(T):
    canvas = torch.full((40_000, L), MASK)
    *_, last = sample(LeaveOneOut(), canvas, objective="uniform", sampler="reverse", steps=T)
    assert (
        total_variation(empirical(last.ids), uniform_law(LeaveOneOut(), T)) < 0.0255
        and last.nfe == T
    )


def test_correctors_keep_the_noisy_distribution():
    """One position at a time, the sweep's law leaves q(x_m) as it is; swept samples are nearer to
    the data."""
    m = 0.4
    keep = (1 - m) * torch.eye(V, dtype=torch.float64) + m / V
    noisy = P @ torch.stack([keep[SEQUENCES[:, i]][:, SEQUENCES[:, i]] for i in range(L)]).prod(0)
    pi = LeaveOneOut()(SEQUENCES, torch.full((81,), m)).softmax(-1)
    for i in range(L):
        same = torch.stack(
            [SEQUENCES[:, j][:, None] == SEQUENCES[:, j] for j in range(L) if j != i]
        ).all(0)
        move = same * ((1 - m) * pi[:, i] + m / V)[:, SEQUENCES[:, i]]
        torch.testing.assert_close(noisy @ move, noisy, atol=1e-7, rtol=0)
    canvas, errors = torch.full((40_000, L), MASK), []
    for sweeps in (0, 8):
        *_, last = sample(
            LeaveOneOut(),
            canvas,
            objective="uniform",
            sampler="reverse",
            steps=4,
            correctors=sweeps,
        )
        errors.append(total_variation(empirical(last.ids), P))
    assert last.nfe == 4 + 3 * 8 and errors[1] < errors[0] - 0.02, (
        "no sweep after the last step: there is no noise left"
    )


@pytest.mark.parametrize("preset", ("tales", "shakespeare", "stories"))
def test_uniform_noise_starts_unsure(preset):
    """A new network knows little, and the bound says so; large tied embeddings would be sure of
    what they see (26 nats), where this bound has no gradient."""
    cfg = load([preset, "--objective", "uniform", "--n_layer", "2"])[0]
    torch.manual_seed(1)
    model, rows = Transformer(cfg, 101), torch.randint(100, (256, 16), generator=generator(1))
    drawn = family_of(cfg).corrupt((256, 16), generator(2))
    loss = family_of(cfg).loss(model, rows, drawn).mean()
    assert 0.9 * math.log(100) < loss.item() < 3.3 * math.log(100)
    loss.backward()
    assert model.embedding.weight.grad.norm() > 1e-3


def test_uniform_training_loss_is_an_unbiased_bound():
    """Whatever the schedule, on rows of one noise level each (the lookup wants that): m by
    quadrature, noise drawn."""
    cfg = settings(objective="uniform", corruption="bernoulli", schedule="poly2")
    drawn = family_of(cfg).corrupt((4000, L), generator(3))
    kept = (~drawn.masked).float().mean(1)
    assert ((1 - drawn.level) - kept).mean().abs() < 0.02 and drawn.noise.shape == (4000, L)
    t = drawn.level.double().sqrt()
    torch.testing.assert_close(drawn.weight.double(), 2 * t, atol=1e-3, rtol=0)

    class Perfect(LeaveOneOut):
        def __call__(self, ids, noise_level, select=None):
            return torch.stack(
                [
                    LeaveOneOut.__call__(self, row[None], level[None])[0]
                    for row, level in zip(ids, noise_level)
                ]
            )

    x0 = SEQUENCES[[ROW]].expand(1500, L)
    drawn = family_of(cfg).corrupt((1500, L), generator(4))
    losses = family_of(cfg).loss(Perfect(), x0, drawn).double() * L
    exact = -P[ROW].log().item()
    assert abs(losses.mean().item() - exact) < 4 * losses.std().item() / math.sqrt(1500)
    bound = family_of(cfg).nelbo(Perfect(), x0[:300], 2) * L
    assert abs(bound.mean().item() - exact) < 4 * bound.std().item() / math.sqrt(600)


def test_uniform_steps_for_viewers():
    """Given tokens stay; every state is text; the first step shows all, later ones what changed."""
    canvas = torch.tensor([[0, MASK, MASK, MASK], [MASK, 1, MASK, 2], [0, 1, 2, 0]])
    before = canvas
    for number, step in enumerate(
        sample(LeaveOneOut(), canvas, objective="uniform", sampler="reverse", steps=5, top=2)
    ):
        assert (step.ids[canvas != MASK] == canvas[canvas != MASK]).all() and step.ids.max() < MASK
        assert step.fresh.equal((canvas == MASK) if number == 0 else step.ids != before)
        assert step.t[0].item() == pytest.approx(1 - (number + 1) / 5) and not step.masked.any()
        before = step.ids.clone()
    assert step.row_nfe.tolist() == [5, 5, 0] and step.nfe == 5
    for steps in (5, None):
        *_, together = sample(
            LeaveOneOut(), canvas, objective="uniform", sampler="reverse", steps=steps
        )
        *_, alone = sample(
            LeaveOneOut(),
            canvas[1:2],
            objective="uniform",
            sampler="reverse",
            steps=steps,
            seeds=[1],
        )
        assert torch.equal(alone.ids[0], together.ids[1])


# --- what a network says: pi, or rho --------------------------------------------------------------


class OfRows(LeaveOneOut):
    """The same for rows of several noise levels."""

    def __call__(self, ids, noise_level, select=None):
        levels, which = noise_level.unique(return_inverse=True)
        tables = torch.stack([self.posterior(level.double()).log() for level in levels])
        logits = tables[which, code(ids)]
        return logits if select is None else logits.flatten(0, 1)[select]


def test_rho_is_turned_into_pi_and_back():
    for m in (1e-3, 0.2, 0.7, 0.999):
        level = torch.full((81,), m, dtype=torch.float64)
        pi, rho = LeaveOneOut()(SEQUENCES, level), LeaveOneOut(full=True)(SEQUENCES, level)
        found = uniform.leave_one_out(rho, SEQUENCES, level[:, None].expand(81, L))
        torch.testing.assert_close(found.softmax(-1), pi.softmax(-1), atol=1e-12, rtol=0)
        flat = (pi.softmax(-1).flatten(0, 1), SEQUENCES.flatten(), level.repeat_interleave(L))
        back = uniform.posterior(*flat, torch.zeros_like(flat[-1]))
        back = back / back.sum(-1, keepdim=True)
        torch.testing.assert_close(back, rho.softmax(-1).flatten(0, 1), atol=1e-12, rtol=0)


def of_loss(name, **changes):
    """The family of a model that was trained with that loss."""
    return toy.family(objective="uniform", loss_weighting=name, **changes)


@pytest.mark.parametrize("told", ("adaln", "none"))
@pytest.mark.parametrize("name, full", (("elbo", False), ("flat", False), ("full", True)))
def test_the_bound_is_of_what_the_network_says(name, full, told):
    """Of the perfect network, whichever posterior it was trained to say, the likelihood itself."""
    kind = of_loss(name, time_conditioning=told)
    x0 = SEQUENCES[[ROW]].expand(400, L)
    bound = kind.nelbo(OfRows(full=full), x0, 4) * L
    error, exact = bound.std().item() / math.sqrt(bound.numel()), -P[ROW].log().item()
    # where it is not told the level, the network could not be this one, and the level is guessed
    slack = 0.5 if told == "none" and full else 0
    assert -4 * error < bound.mean().item() - exact < 4 * error + slack


@pytest.mark.parametrize("level", (0.3, 0.8))
def test_what_cross_entropy_makes_a_network_say(level):
    """rho has the least loss at all positions, pi at the corrupted ones alone, and a little blur
    costs both."""
    x0 = SEQUENCES[P.multinomial(30_000, replacement=True, generator=generator(1))]
    loss = {}
    for name in ("full", "flat"):
        kind = of_loss(name)
        weight, m = torch.ones(30_000, 1), torch.full((30_000, 1), level)
        drawn = kind.drawn(L, weight, m, generator(2))
        for who, full in (("rho", True), ("pi", False)):
            for blur in (0.0, 0.05):
                network = LeaveOneOut(blur, full)
                loss[name, who, blur] = kind.loss(network, x0, drawn).mean().item()
    for name, best, other in (("full", "rho", "pi"), ("flat", "pi", "rho")):
        assert loss[name, best, 0.0] < loss[name, other, 0.0] - 0.005
        assert loss[name, best, 0.0] < loss[name, best, 0.05]


class Untold:
    """The perfect network that is not told the noise level, which is uniform: its rho, or its pi at
    corrupted positions."""

    vocab_size = V + 1

    def __init__(self, full):
        nodes, weights = np.polynomial.legendre.leggauss(32)
        total, mass = 0, 0
        for s, w in zip(torch.tensor(nodes / 2 + 0.5), torch.tensor(weights / 2)):
            keep = (1 - s) * torch.eye(V, dtype=torch.float64) + s / V
            each = torch.stack([keep[SEQUENCES[:, i]][:, SEQUENCES[:, i]] for i in range(L)])
            chance = P @ each.prod(0)  # of xt, (81,)
            p = LeaveOneOut(full=full).posterior(s)  # (81, 4, 3)
            # of a corrupted position, what stands there is as likely as any token
            others = (
                torch.stack(
                    [
                        P @ torch.stack([each[j] for j in range(L) if j != i]).prod(0)
                        for i in range(L)
                    ]
                ).T
                * s
                / V
            )
            weight = chance[:, None].expand(81, L) if full else others
            total, mass = total + w * weight[..., None] * p, mass + w * weight[..., None]
        self.logits = (total / mass).log()

    def __call__(self, ids, noise_level, select=None):
        logits = self.logits[code(ids)]
        return logits if select is None else logits.flatten(0, 1)[select]


class Turned:
    """What a family makes of a network's logits, as a network that says pi."""

    def __init__(self, kind, model):
        self.kind, self.model = kind, model

    def __call__(self, ids, level):
        logits, shape = self.model(ids, level), (len(ids), L)
        drawn = self.kind.drawn(L, torch.ones(len(ids), 1), level[:, None], generator(0))
        return self.kind.leave_one_out(logits, ids, level[:, None].expand(shape), drawn)


@pytest.mark.parametrize("name, excess", (("full", 0.156), ("flat", 0.169)))
def test_the_bound_of_a_network_that_is_not_told_the_level(name, excess):
    """Above the entropy, and finite: with the true level in Bayes' rule instead of the guessed one
    it has no end."""
    kind = of_loss(name, time_conditioning="none")
    model = Untold(full=name == "full")
    bound = exact_uniform_nelbo(Turned(kind, model))
    assert (P * bound).sum().item() == pytest.approx(ENTROPY + excess, abs=2e-3)
    if name == "full":
        told = exact_uniform_nelbo(Turned(of_loss(name, time_conditioning="adaln"), model))
        assert (P * told).sum().item() > (P * bound).sum().item() + 0.3


@pytest.mark.parametrize("T", (2, 4))
def test_the_reverse_process_of_a_network_that_says_rho(T):
    """Its law is that of one that says pi: rho plugged in would be another."""
    canvas = torch.full((40_000, L), MASK)
    how = {"objective": "uniform", "loss_weighting": "full", "time_conditioning": "adaln"}
    *_, last = sample(LeaveOneOut(full=True), canvas, sampler="reverse", steps=T, **how)
    assert total_variation(empirical(last.ids), uniform_law(LeaveOneOut(), T)) < 0.0255


@pytest.mark.parametrize("name", ("elbo", "full"))
def test_accept_and_renoise_draws_from_rho(name, monkeypatch):
    """At the noise level that is the share of noise in the canvas, whatever the network says."""
    kind, seen = of_loss(name, time_conditioning="adaln"), []
    kept = uniform.Renoise.belief

    def belief(self, logits, ids, asked, turn):
        p = kept(self, logits, ids, asked, turn)
        seen.append((ids.clone(), asked, turn.m_t[:, 0].clone(), p))
        return p

    monkeypatch.setattr(uniform.Renoise, "belief", belief)
    canvas = torch.full((50, L), MASK)
    how = SampleConfig(sampler="entropy_bounded:0.8", steps=5, top_p=1.0)
    masked = torch.ones(50, L, dtype=torch.bool)
    for step in diffusion.sample(kind, OfRows(full=name == "full"), canvas, how):
        ids, asked, level, p = seen.pop()
        torch.testing.assert_close(level[asked[:, 0]], masked.double().mean(1)[asked[:, 0]])
        rho = OfRows(full=True)(ids, level.clamp(min=uniform.LEAST)).softmax(-1)
        torch.testing.assert_close(p.double(), rho[asked], atol=2e-4, rtol=0)
        masked = step.masked


# --- blocks ---------------------------------------------------------------------------------------


class BlockOfNoise:
    """The perfect network of uniform noise in blocks, for [noisy ; clean] and, with a cache or
    without, for a canvas: p(x0_i | clean blocks before, noisy tokens of its block but i); full:
    with that token too, level: as if that were the noise level."""

    vocab_size = V + 1

    def __init__(self, n, blur=0.0, full=False, level=None):
        self.n, self.blur, self.full, self.level = n, blur, full, level

    def __call__(self, ids, noise_level, *, attention, positions=None, select=None, cache=None):
        B, W = ids.shape
        m = noise_level[:, :L].double()
        m = m if self.level is None else torch.full_like(m, self.level)
        noisy, clean = ids[:, :L], ids[:, -L:]
        keep = (1 - m)[:, None, :] * (noisy[:, None] == SEQUENCES) + (m / V)[:, None]  # (B, 81, L)
        same = clean[:, None] == SEQUENCES
        out = []
        for i in range(L):
            block = range(i // self.n * self.n, i // self.n * self.n + self.n)
            chance = P * same[..., : block.start].all(-1)
            for j in block:
                chance = chance * (1 if j == i and not self.full else keep[..., j])
            p = chance @ torch.nn.functional.one_hot(SEQUENCES[:, i], V).double()
            out.append(p / p.sum(-1, keepdim=True))
        p = torch.stack(out, 1)
        logits = ((1 - self.blur) * p + self.blur / V).log()
        if select is None:
            return logits
        assert W in (L, 2 * L)
        return logits.flatten(0, 1)[select // W * L + select % W]


def enumerated_bound(n, blur):
    """(81,) nats: every block, noise and level, by the form of UDLM (arXiv:2412.10193)."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    network, total = BlockOfNoise(n, blur), torch.zeros(81, dtype=torch.float64)
    noises = torch.tensor(list(itertools.product(range(V), repeat=n)))
    for s, w in zip(torch.tensor(nodes / 2 + 0.5), torch.tensor(weights / 2)):
        m = s**3
        alpha, jacobian = 1 - m, 3 * s**2 * w
        for start in range(0, L, n):
            for noise in noises:
                xt = SEQUENCES.clone()
                xt[:, start : start + n] = noise
                level = torch.zeros(81, 2 * L, dtype=torch.float64)
                level[:, start : start + n] = m
                both = torch.cat((xt, SEQUENCES), 1)
                pi = network(both, level, attention=None).softmax(-1)[:, start : start + n]
                x0 = SEQUENCES[:, start : start + n]
                chance = (alpha * (x0 == noise) + m / V).prod(1)
                one_hot = torch.nn.functional.one_hot(x0, V).double()
                bar, theta = V * alpha * one_hot + m, V * alpha * pi + m
                at = lambda table: table.gather(-1, noise.expand(81, n)[..., None])
                each = V / at(theta) - V / at(bar)
                each = each + (bar / at(bar) * ((bar * at(theta)) / (at(bar) * theta)).log()).sum(
                    -1, keepdim=True
                )
                total += jacobian * chance * each[..., 0].sum(1) / (V * alpha)
    return total


@pytest.mark.parametrize("n, blurred", ((1, 3.7295673421), (2, None), (4, 3.7400459560)))
def test_the_bound_of_uniform_blocks(n, blurred):
    """By an enumeration of its own: the likelihood itself with the perfect network; with a worse
    one, in blocks of one its exact likelihood from left to right, as for masks."""
    perfect, worse = enumerated_bound(n, 0.0), enumerated_bound(n, 0.2)
    assert (perfect + P.log()).abs().max() < 1e-5
    mean = (P * worse).sum().item()
    assert ENTROPY < mean < 3.75 and (blurred is None or abs(mean - blurred) < 1e-5)
    kind = toy.family(objective="uniform", block_len=n, seq_len=L, schedule="poly2")
    x0 = SEQUENCES[P.multinomial(4000, replacement=True, generator=generator(5))]
    for blur, exact in ((0.0, perfect), (0.2, worse)):
        network = BlockOfNoise(n, blur) if n < L else OfRows(blur)
        drawn = kind.corrupt(x0.shape, generator(6))
        rows = slice(0, 4000 if n < L else 400)
        for losses in (
            kind.nelbo(network, x0[rows], 1)[:, 0] * L,
            kind.loss(network, x0[rows], drawn.each(lambda part: part[rows])) * L,
        ):
            gap = losses.double() - exact[code(x0[rows])]
            assert abs(gap.mean().item()) < 4 * gap.std().item() / math.sqrt(len(gap)), (n, blur)


@pytest.mark.parametrize(
    "n, name, level",
    ((1, "flat", None), (2, "flat", None), (1, "full", None), (2, "full", None), (1, "full", 0.5)),
)
def test_the_bound_of_blocks_of_a_network_that_learned_cross_entropy(n, name, level):
    """The likelihood itself, whichever posterior the perfect network says. One that is not told the
    level of a block of one token has nothing to guess it from: it means that of the middle, 0.5,
    and so does the bound."""
    told = "adaln" if level is None else "none"
    kind = of_loss(name, block_len=n, seq_len=L, schedule="linear", time_conditioning=told)
    x0 = SEQUENCES[P.multinomial(4000, replacement=True, generator=generator(5))]
    network = BlockOfNoise(n, full=name == "full", level=level)
    gap = kind.nelbo(network, x0, 1)[:, 0] * L + P[code(x0)].log()
    assert abs(gap.mean().item()) < 4 * gap.std().item() / math.sqrt(len(gap))
    wrong = kind.nelbo(BlockOfNoise(n, full=name == "flat", level=level), x0, 1)[:, 0] * L
    assert (wrong + P[code(x0)].log()).mean().item() > 0.03


@pytest.mark.parametrize("n", (1, 2))
@pytest.mark.parametrize("cache", ("auto", "none"))
def test_uniform_blocks_generate_the_data(n, cache):
    """By the reverse process in each block, as near as its number of steps allows."""

    class Finished(BlockOfNoise):
        """What is computed again with a cache, (b, l), as a whole canvas."""

        def __call__(self, ids, noise_level, *, positions=None, select=None, **more):
            if positions is None:
                return super().__call__(ids, noise_level, select=select, **more)
            self.seen = getattr(self, "seen", torch.zeros(len(ids), L, dtype=torch.long))
            self.seen = self.seen.scatter(1, positions, ids)
            level = torch.zeros(len(ids), L).scatter(1, positions, noise_level.float())
            logits = super().__call__(self.seen, level, **more)
            wide = positions[..., None].expand(-1, -1, V)
            return logits.gather(1, wide).flatten(0, 1)[select]

    canvas = torch.full((20_000, L), MASK)
    how = {"objective": "uniform", "block_len": n, "sampler": "reverse", "cache": cache}
    *_, last = sample(Finished(n), canvas, steps=64, **how)
    assert total_variation(empirical(last.ids), P) < 0.03
    assert last.row_nfe.unique().tolist() == [64]


def test_a_block_with_little_noise_is_not_told_that_it_is_clean(monkeypatch):
    """The clean half says something else, the next token with ar_weight; the bound of a network
    that took the one for the other was many times what it should be."""
    told = {"block_len": 4, "ar_weight": 0.5, "time_conditioning": "adaln"}
    kind, model, seen = (of_loss("full", **told), toy.network(6, 5, **CANVAS | told), [])
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda ids, level, **more: (seen.append(level), forward(ids, level, **more))[1],
    )
    x0 = torch.randint(5, (3, 12), generator=generator(1))
    kind.predict(
        model, x0, kind.drawn(12, torch.ones(3, 3), torch.full((3, 3), 1e-5), generator(2))
    )
    [levels] = seen
    assert (levels[:, :12] == uniform.LEAST_TOLD).all() and (levels[:, 12:] == 0).all()
    for cache in ("auto", "none"):
        seen.clear()
        how = {"loss_weighting": "full", "sampler": "entropy_bounded:9", "cache": cache}
        *_, last = sample(model, torch.full((2, 12), 5), steps=9, **CANVAS | told | how)
        inside = torch.stack([levels.max(1).values for levels in seen])
        assert (inside >= uniform.LEAST_TOLD - 1e-9).all() and (inside < 0.011).any()


def test_correctors_in_blocks():
    """Each block has its own, none before its first step or after its last; they bring the samples
    nearer to the data."""
    canvas, errors = torch.full((20_000, L), MASK), []
    how = {"objective": "uniform", "block_len": 2, "cache": "none", "steps": 4}
    for sweeps in (0, 8):
        *_, last = sample(BlockOfNoise(2), canvas, correctors=sweeps, **how)
        errors.append(total_variation(empirical(last.ids), P))
        assert last.row_nfe.unique().tolist() == [4 + 2 * sweeps]
    assert errors[1] < errors[0] - 0.02


# --- accept and renoise ---------------------------------------------------------------------------


RENOISING = ("entropy_bounded:0.1", "entropy_bounded:0", "confidence", "threshold:0.5")


@pytest.mark.parametrize("sampler", RENOISING)
@pytest.mark.parametrize("name", ("elbo", "full"))
def test_accept_and_renoise(name, sampler):
    canvas = torch.tensor([[0, MASK, MASK, MASK], [MASK, 1, MASK, 2], [0, 1, 2, 0], [MASK] * 4])
    how = {"objective": "uniform", "loss_weighting": name, "sampler": sampler}
    how |= {"temperature": 0.8, "final_temperature": 0.4}
    network = OfRows(full=name == "full")
    for steps in (1, 3, 8):
        masked = canvas == MASK
        for step in sample(network, canvas, steps=steps, top=2, **how):
            assert (step.ids[canvas != MASK] == canvas[canvas != MASK]).all()
            assert step.ids.max() < MASK and not (step.fresh & step.remasked).any()
            assert not (step.remasked & masked).any(), "what was noise is not renoised"
            assert not (step.masked & ~masked & ~step.remasked).any()
            masked = step.masked
        assert not step.masked.any() and (step.row_nfe <= steps).all() and step.row_nfe[2] == 0
        assert (step.t == 0).all()
        for r, row in enumerate(canvas[:2]):
            *_, alone = sample(network, row[None], steps=steps, seeds=[r], **how)
            assert torch.equal(alone.ids[0], step.ids[r])


def test_how_many_are_accepted():
    """At least as many as the grid says; or, by DiffusionGemma's own rule, as fit the bound, until
    the last step takes all."""

    class Unsure(LeaveOneOut):
        def __call__(self, ids, noise_level, select=None):
            logits = torch.zeros(*ids.shape, V, dtype=torch.float64)
            return logits if select is None else logits.flatten(0, 1)[select]

    canvas = torch.full((3, L), MASK)
    how = {"objective": "uniform", "loss_weighting": "full", "steps": 4}
    for sampler, expected in (
        ("entropy_bounded:0.1", [1, 2, 3, 4]),
        ("entropy_bounded_strict:0.1", [1, 1, 1, 4]),
        ("entropy_bounded", [1, 2, 3, 4]),
        ("entropy_bounded:3", [3, 3, 3, 4]),  # three times log 3 but one is below 3
        ("confidence", [1, 2, 3, 4]),
        ("threshold:0.9", [1, 2, 3, 4]),
    ):
        steps = sample(Unsure(), canvas, sampler=sampler, **how)
        assert [(L - step.masked.sum(1)).tolist() for step in steps] == [[n] * 3 for n in expected]


def test_the_usual_sampler():
    """The reverse process; accept and renoise for what says rho in blocks."""
    told = {"block_len": 2, "seq_len": L}
    found = [
        of_loss(*name, **more).usual
        for name, more in ((["elbo"], {}), (["elbo"], told), (["full"], {}), (["full"], told))
    ]
    assert found == ["reverse"] * 3 + ["entropy_bounded"]


def test_it_stops_when_all_is_accepted_and_nothing_changes():
    """A network that is sure: one step accepts all, the next changes nothing."""

    class Sure(LeaveOneOut):
        def __call__(self, ids, noise_level, select=None):
            logits = torch.tensor([0.0, 30.0, 0.0], dtype=torch.float64).expand(*ids.shape, V)
            return logits if select is None else logits.flatten(0, 1)[select]

    canvas = torch.full((2, L), MASK)
    how = {"objective": "uniform", "loss_weighting": "full", "sampler": "entropy_bounded:0.1"}
    *_, last = sample(Sure(), canvas, steps=50, **how)
    assert (last.ids == 1).all() and last.row_nfe.tolist() == [2, 2]


def test_the_temperature_falls(monkeypatch):
    """From the first step to the last, for masks too; and it is what is drawn from."""
    seen, kept = [], draws.truncate

    def truncate(logits, temperature, *rest):
        seen.append(float(temperature))
        return kept(logits, temperature, *rest)

    monkeypatch.setattr(draws, "truncate", truncate)
    how = {"temperature": 0.8, "final_temperature": 0.2, "steps": 4, "sampler": "random"}
    list(sample(toy.Lookup(), torch.full((1, L), MASK), **how))
    assert seen == pytest.approx([0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("n", (0, 2))
def test_a_draft_has_all_its_steps(n):
    """In every block as many as without one, from its noise level down to 0."""
    model = toy.network(4, 5, torch.float64, objective="uniform")
    canvas, levels = torch.full((2, L), MASK), []
    watched = lambda ids, level, **more: (levels.append(level.max().item()), model(ids, **more))[1]
    watched.vocab_size, kind = V + 1, of_loss("elbo", block_len=n)
    how = SampleConfig(steps=6, top_p=1.0, draft_noise=0.3, cache="none")
    draft = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    *_, last = diffusion.sample(kind, watched, canvas, how, draft=draft)
    assert last.row_nfe.tolist() == [6, 6] and levels[0] == pytest.approx(0.3)
    blocks = [levels] if not n else [levels[:3], levels[3:]]
    assert all(part == sorted(part, reverse=True) and part[0] == blocks[0][0] for part in blocks)


@pytest.mark.parametrize("name", ("elbo", "full"))
def test_a_draft_is_repaired(name):
    """The reverse process takes it for a text with noise, and draws what it was from the posterior
    p(x0 | draft) of that noise level."""
    kind = of_loss(name, time_conditioning="adaln")
    m, draft = 0.4, torch.tensor([0, 2, 2, 1])
    posterior = P * ((1 - m) * (SEQUENCES == draft) + m / V).prod(1)
    posterior = posterior / posterior.sum()
    how = SampleConfig(steps=64, top_p=1.0, draft_noise=m)
    canvas = torch.full((20_000, L), MASK)
    begun = {"draft": draft.expand(20_000, L)}
    *_, last = diffusion.sample(kind, LeaveOneOut(full=name == "full"), canvas, how, **begun)
    assert total_variation(empirical(last.ids), posterior) < 0.03


# --- self-conditioning ----------------------------------------------------------------------------

SELF = {"self_conditioning": 0.5, "n_layer": 2, "n_head": 2, "n_embd": 16}
KINDS = (
    {},
    {"block_len": 4},
    {"objective": "uniform", "time_conditioning": "none"},
    {"objective": "uniform", "time_conditioning": "none", "block_len": 4, "ar_weight": 0.5},
)


def conditioned(changes):
    """(family, network) whose earlier predictions count."""
    cfg = settings(**SELF | changes)
    model = toy.network(6, 5, torch.float64, **SELF | changes)
    torch.nn.init.normal_(model.earlier.weight, std=0.5)
    return family_of(cfg), model


@pytest.mark.parametrize("changes", KINDS)
def test_half_of_the_rows_have_a_first_pass(changes):
    kind, model = conditioned(changes)
    x0 = torch.randint(5, (8, 12), generator=generator(1))
    drawn = kind.corrupt((8, 12), generator(2)).to(x0.device)
    assert drawn.conditioned.sum() == 4
    losses = [
        kind.loss(model, x0, drawn._replace(conditioned=rows))
        for rows in (drawn.conditioned, torch.zeros(8).bool(), None)
    ]
    rows = drawn.conditioned
    torch.testing.assert_close(losses[0][~rows], losses[1][~rows], atol=1e-9, rtol=0)
    torch.testing.assert_close(losses[0][rows], losses[2][rows], atol=1e-9, rtol=0)
    assert (losses[1] - losses[2]).abs().min() > 1e-6
    # a network that has just begun does not hear of it
    torch.nn.init.zeros_(model.earlier.weight)
    losses = [kind.loss(model, x0, drawn._replace(conditioned=c)) for c in (rows, None)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("changes", KINDS)
def test_a_prediction_is_shown_where_something_is_predicted(changes):
    """Not of clean tokens: the first pass of the bound has it at what is noised alone."""
    kind, model = conditioned(changes)
    shown, forward = [], model.forward
    model.forward = lambda *args, prediction=None, **more: (
        shown.append(prediction),
        forward(*args, prediction=prediction, **more),
    )[1]
    x0 = torch.randint(5, (3, 12), generator=generator(1))
    given = torch.arange(12).expand(3, 12) < 4
    bound = kind.nelbo(model, x0, 1, given)
    assert bound.isfinite().all() and len(shown) == 2 and shown[0] is None
    assert (shown[1][:, :4] == 0).all() and (shown[1][:, 12:] == 0).all()
    assert (shown[1][:, 4:12] != 0).any()


@pytest.mark.parametrize("sampler", ("", "first_hitting"))
@pytest.mark.parametrize("changes", KINDS)
def test_sampling_shows_what_was_predicted_in_the_step_before(changes, sampler):
    if sampler and "objective" in changes:
        pytest.skip("a sampler of masks")
    kind, model = conditioned(changes)
    calls, forward = [], model.forward

    def watched(ids, *args, prediction=None, select=None, **more):
        logits = forward(ids, *args, prediction=prediction, select=select, **more)
        calls.append((ids, prediction, select, logits))
        return logits

    model.forward = watched
    canvas = torch.full((2, 9), 5)
    canvas[:, 0] = 1
    how = {"sampler": sampler} if sampler else {}
    *_, last = sample(model, canvas, steps=6, **SELF | changes, **how)
    assert (calls[0][1] == 0).all() and last.nfe == len(calls), "a call a step, no first pass"
    for (_, _, select, logits), (ids, seen, asked, _) in zip(calls, calls[1:]):
        if seen.shape[:2] != (2, 9) or len(select) != len(logits):
            continue  # with exact keys some of the positions are computed, others kept
        said = torch.zeros(18, 16, dtype=torch.float64)
        said[select] = model.mean_embedding(logits)
        both = asked[torch.isin(asked, select)]
        torch.testing.assert_close(seen.flatten(0, 1)[both], said[both])
        assert (seen[:, 0] == 0).all(), "it is given"
    *_, alone = sample(model, canvas[1:], steps=6, seeds=[1], **SELF | changes, **how)
    assert torch.equal(alone.ids[0], last.ids[1])


@pytest.mark.parametrize("cache", ("prefix", "dual"))
def test_an_approximate_cache_shows_the_same(cache):
    """One that is made anew in every step changes nothing."""
    _, model = conditioned({})
    canvas = torch.full((3, 12), 5)
    canvas[:, 0], canvas[1, 5:7] = 1, 2
    how = SELF | {"steps": 9, "decode_block": 4, "sampler": "confidence"}
    found = [
        list(sample(model, canvas, **how | more))[-1].ids
        for more in ({}, {"cache": cache, "cache_refresh": 1})
    ]
    assert torch.equal(*found)
    *_, last = sample(model, canvas, cache=cache, **how)
    assert last.ids.max() < 5


# --- the autoregressive loss of the clean half ----------------------------------------------------

CANVAS = {"objective": "uniform", "block_len": 4, "ar_weight": 0.5, "time_conditioning": "none"}


@pytest.mark.parametrize("rows", ("stream", "document"))
def test_the_clean_half_is_read_from_left_to_right(rows):
    """Its logits are those of a causal pass over the text, and do not move with what comes after or
    with the noise; the loss has their cross entropy besides."""
    cfg = settings(**CANVAS, rows=rows, n_layer=2, n_head=2, n_embd=16)
    kind = family_of(cfg)
    model, L = toy.network(6, 5, torch.float64, **CANVAS), 12 + kind.bos
    x0 = torch.randint(5, (3, L), generator=generator(1))
    drawn = kind.corrupt((3, L), generator(2)).to(x0.device)
    _, _, clean, _ = kind.predict(model, x0, drawn)
    plain = model(x0, torch.zeros(3), attention="causal")
    torch.testing.assert_close(clean, plain.double(), atol=1e-9, rtol=0)
    ce = torch.nn.functional.cross_entropy(
        plain[:, :-1].flatten(0, 1), x0[:, 1:].flatten(), reduction="none"
    ).view(3, -1)
    exact = kind.left_to_right(model, x0)
    torch.testing.assert_close(exact, ce.sum(1) / L, atol=1e-6, rtol=0)
    without = family_of(settings(**CANVAS | {"ar_weight": 1e-12}, rows=rows))
    extra = kind.loss(model, x0, drawn) - without.loss(model, x0, drawn)
    torch.testing.assert_close(extra, 0.5 * ce.sum(1) / L, atol=1e-6, rtol=0)


@pytest.mark.parametrize("window", (None, 9))
def test_one_network_generates_from_left_to_right_and_in_blocks(window):
    """Token by token it asks for the logits of a causal pass over what stands there."""
    model = toy.network(6, 5, torch.float64, **CANVAS)
    canvas = torch.full((2, 14), 5)
    canvas[:, :2] = torch.tensor([[1, 2], [3, 0]])
    how = CANVAS | {"sampler": "left_to_right", "temperature": 0.0}
    *_, last = sample(model, canvas, window=window, **how)
    assert last.row_nfe.tolist() == [12, 12]
    if window is None:
        logits = model(last.ids, torch.zeros(2), attention="causal")
        assert torch.equal(last.ids[:, 2:], logits[:, 1:-1].argmax(-1))
    for sampler in ("reverse", "entropy_bounded:0.1"):
        steps = list(sample(model, canvas, window=window, **how | {"sampler": sampler, "steps": 6}))
        assert steps[-1].ids.max() < 5 and not steps[-1].masked.any()
    kind, draft = family_of(settings(**CANVAS)), torch.zeros_like(canvas)
    with pytest.raises(UserError, match="--draft is nothing for --sampler left_to_right"):
        repair.begin(kind, model, canvas, draft, SampleConfig(sampler="left_to_right"))
    with pytest.raises(UserError, match="needs something to begin with"):
        list(sample(model, torch.full((1, 6), 5), **how))


def test_left_to_right_is_the_law_of_the_network():
    """What the perfect autoregressive network generates has the law of the data, and
    `Uniform.left_to_right` says how likely it is, but for the first token, which is given."""

    class Chain:
        """p(x_i+1 | x_1 .. x_i) at position i, for the whole row or as new positions of it."""

        vocab_size = V + 1

        def __call__(self, ids, level, *, positions=None, select=None, attention=None, cache=None):
            if positions is not None:
                self.seen = getattr(self, "seen", torch.zeros(len(ids), L + 1, dtype=torch.long))
                self.seen = self.seen.scatter(1, positions, ids)
                rows, place = self.seen[:, 1:], positions - 1
            else:
                rows, place = ids, torch.arange(L).expand(len(ids), L)
            out = []
            for i in place[0].tolist():
                same = (rows[:, None, : i + 1] == SEQUENCES[:, : i + 1]).all(-1) * P
                p = same @ torch.nn.functional.one_hot(SEQUENCES[:, min(i + 1, L - 1)], V).double()
                out.append((p / p.sum(-1, keepdim=True)).log())
            logits = torch.stack(out, 1)
            return logits if select is None else logits.flatten(0, 1)[select]

    kind = of_loss("full", block_len=2, seq_len=L, ar_weight=0.5, time_conditioning="none")
    first = torch.stack([P[SEQUENCES[:, 0] == v].sum() for v in range(V)])
    exact = kind.left_to_right(Chain(), SEQUENCES) * L
    torch.testing.assert_close(exact, first[SEQUENCES[:, 0]].log() - P.log(), atol=1e-6, rtol=0)
    canvas = torch.full((20_000, L), MASK)
    canvas[:, 0] = first.multinomial(20_000, replacement=True, generator=generator(3))
    how = {"objective": "uniform", "block_len": 2, "ar_weight": 0.5, "time_conditioning": "none"}
    *_, last = sample(Chain(), canvas, sampler="left_to_right", **how)
    assert total_variation(empirical(last.ids), P) < 0.03


@pytest.mark.parametrize("causal", (0.0, 0.5))
@pytest.mark.parametrize("bos", (0, 1))
def test_keys_that_are_kept_are_those_of_training(bos, causal):
    """Sampling with exact keys and values and without give the same text."""
    changes = CANVAS | {"ar_weight": causal, "rows": ("stream", "document")[bos]}
    model = toy.network(6, 5, torch.float64, **changes)
    canvas = torch.full((3, 12 + bos), 5)
    canvas[:, 0], canvas[1, 1:3] = 0, 2
    for sampler in ("reverse", "entropy_bounded:0.1"):
        found = [
            list(sample(model, canvas, steps=9, sampler=sampler, cache=cache, **changes))[-1].ids
            for cache in ("auto", "none")
        ]
        assert torch.equal(*found)


def test_what_uniform_noise_cannot_have():
    for words, message in (
        ("--ar_weight 1", "ar_weight=1.0 with a model of uniform noise.*blocks only"),
        ("--block_len 11 --time_sampling importance", "time_sampling=importance.*of its own"),
    ):
        with pytest.raises(UserError, match=message):
            checked(load(["tales", "--objective", "uniform", *words.split()])[0])
