"""The mathematics against exact answers: a toy distribution through the same loss and sampler code
as the real network.

Expected values are those of the design's mathematics document, section 5; the item is named at each
test.
"""

import itertools
import math

import pytest
import torch
import toy
from toy import (
    CANVASES,
    MASK,
    MASKED,
    SEQUENCES,
    L,
    Lookup,
    P,
    V,
    code,
    conditionals,
    empirical,
    family,
    sample,
    settings,
    total_variation,
)

from diffusion import SCHEDULES, Corruption, mask_ratio, mask_ratio_slope, time_of
from utils import draws, metrics, policies
from utils.cli import UserError
from utils.families import family_of
from utils.policies import SAMPLERS
from utils.runtime import generator

ENTROPY = 3.6957438948
# the 15 non-empty ones
SUBSETS = torch.tensor([s for s in itertools.product((False, True), repeat=L) if any(s)])


def exact_nelbo(model, x0):
    """NELBO of each row of x0 in nats, all 15 masks enumerated: sum over S of 1 / (|S| C(4, |S|))
    sum of CE over S."""
    total = torch.zeros(len(x0), dtype=torch.float64)
    for subset in SUBSETS:
        size = int(subset.sum())
        weight = torch.full((len(x0),), L / size / math.comb(L, size) / L, dtype=torch.float64)
        total += MASKED.weighted_ce(model, x0, Corruption(subset.expand(len(x0), L), weight)) * L
    return total


# --- the toy itself -------------------------------------------------------------------------------


def test_toy_is_the_documented_one():
    assert P[code(torch.tensor([[0, 0, 0, 0]]))].item() == pytest.approx(0.1715)
    assert P[code(torch.tensor([[0, 1, 2, 0]]))].item() == pytest.approx(0.0075)
    assert -(P * P.log()).sum().item() == pytest.approx(ENTROPY, abs=1e-10)
    conditional = Lookup()(torch.tensor([[MASK, 1, MASK, 0]]))[0].exp()
    assert conditional[0].tolist() == pytest.approx([0.303030, 0.545455, 0.151515], abs=1e-6)
    assert conditional[2].tolist() == pytest.approx([0.341463, 0.292683, 0.365854], abs=1e-6)


# --- item 1: schedules and the forward process ----------------------------------------------------

# name -> (m(t), m'(t)) written from the definition of alpha, not as diffusion.py writes it
EXACT = {
    "linear": (lambda t: t, lambda t: torch.ones_like(t)),
    "cos": (
        lambda t: 1 - torch.cos(math.pi * t / 2),
        lambda t: math.pi / 2 * torch.sin(math.pi * t / 2),
    ),
    "cos2": (
        lambda t: 1 - torch.cos(math.pi * t / 2) ** 2,
        lambda t: math.pi / 2 * torch.sin(math.pi * t),
    ),
    "cos2_s008": (
        lambda t: (
            1
            - torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        ),
        lambda t: (
            math.pi
            / 2
            / 1.008
            * torch.sin((t + 0.008) / 1.008 * math.pi)
            / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        ),
    ),
    "poly2": (lambda t: t**2, lambda t: 2 * t),
    "md4_cosine": (
        lambda t: 1 - (1 - torch.sin(math.pi * t / 2)),
        lambda t: math.pi / 2 * torch.cos(math.pi * t / 2),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    m = mask_ratio(name, t)
    assert m[0] == 0 and m[-1] == 1, "the ends are set, not computed"
    assert (m.diff() > 0).all()
    torch.testing.assert_close(time_of(name, m), t, atol=1e-7, rtol=0)
    if name in EXACT:  # a schedule that somebody adds is checked above
        inner = t[1:-1]
        torch.testing.assert_close(m[1:-1], EXACT[name][0](inner), atol=1e-12, rtol=0)
        torch.testing.assert_close(
            mask_ratio_slope(name, inner), EXACT[name][1](inner), atol=1e-10, rtol=0
        )
    assert mask_ratio(name, t.float())[-1] == 1


def test_mean_mask_share_of_the_sources():
    """Discrete t in 1..T, as the sources draw it: their documents say .368 for the cosine, which
    holds for cos only."""
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert mask_ratio("cos", t).mean().item() == pytest.approx(1 - 2 / math.pi, abs=1e-6)  # .363
    assert mask_ratio("cos2", t).mean().item() == pytest.approx(0.5, abs=1e-6)
    steps = torch.arange(1, 101, dtype=torch.float64) / 100
    assert mask_ratio("cos", steps).mean().item() == pytest.approx(0.368, abs=5e-4)
    assert mask_ratio("cos2", steps).mean().item() == pytest.approx(0.505, abs=5e-4)


def test_count_corruption_masks_exactly_and_uniformly():
    B, length = 512, 24
    corruption = family_of(settings()).corrupt((B, length), generator(1))
    counts = corruption.masked.sum(1)
    assert counts.min() >= 1 and counts.max() <= length
    assert torch.bincount(counts, minlength=length + 1)[1:].float().std() < 0.6, (
        "512 / 24 rows of each count, stratified"
    )
    torch.testing.assert_close(corruption.weight, length / counts.float())
    uniforms = (draws.position_uniforms(1, 4, generator(i))[0] for i in range(3000))
    many = torch.stack([draws.first_of(u, torch.tensor([2]))[0] for u in uniforms])
    patterns = torch.bincount(many.long() @ torch.tensor([8, 4, 2, 1]), minlength=16)
    assert (patterns > 0).sum() == 6 and patterns[patterns > 0].min() > 500 - 4 * math.sqrt(500)


def test_bernoulli_corruption_follows_the_schedule():
    B, length = 256, 400
    for name in SCHEDULES:
        corruption = family_of(settings(schedule=name, corruption="bernoulli")).corrupt(
            (B, length), generator(2)
        )
        u = draws.stratified(B, generator(2))
        m = mask_ratio(name, u)
        off = (corruption.masked.float().mean(1) - m).abs()
        assert (off < 4.5 * (m * (1 - m) / length).sqrt() + 3 / length).all()
        torch.testing.assert_close(
            corruption.weight.double(), mask_ratio_slope(name, u) / m, rtol=1e-4, atol=0
        )


@pytest.mark.parametrize("slices", (1, 2, 8))
def test_strata_cover_every_slice_of_the_batch(slices):
    u = draws.stratified(64, generator(5))
    for part in u.chunk(slices):
        gaps = part.sort().values.diff()
        assert gaps.max() < 2.01 / len(part)
    assert u.min() >= 0 and u.max() < 1
    assert len(draws.stratified(7, generator(6)).mul(7).floor().unique()) == 7


def test_document_rows_keep_their_first_token():
    for corruption in ("count", "bernoulli"):
        drawn = family_of(settings(rows="document", corruption=corruption)).corrupt(
            (64, 10), generator(7)
        )
        assert not drawn.masked[:, 0].any() and drawn.masked[:, 1:].any(0).all()


# --- item 2: the posterior of the forward process -------------------------------------------------


def view(**values):
    """A policies.View with the given values."""
    return policies.View(**{name: None for name in policies.View._fields} | values)


def test_posterior_of_masking_is_bayes():
    """q(x_s = x0 | x_t = MASK, x0) = (m_t - m_s) / m_t is the chance that `ancestral` reveals with,
    from Bayes."""
    for m_s, m_t in ((0.0, 0.4), (0.2, 0.7), (0.5, 1.0)):
        # x_s in (x0, MASK) by x_t in (x0, MASK)
        joint = torch.tensor(
            [
                [(1 - m_s) * (1 - (m_t - m_s) / (1 - m_s)), (1 - m_s) * (m_t - m_s) / (1 - m_s)],
                [0.0, m_s],
            ],
            dtype=torch.float64,
        )
        assert joint.sum().item() == pytest.approx(1, abs=1e-12)
        assert joint[:, 1].sum().item() == pytest.approx(m_t, abs=1e-12)
        u = (torch.arange(100_000, dtype=torch.float64) + 0.5)[None] / 100_000
        seen = view(
            open=torch.ones(1, 100_000, dtype=torch.bool),
            m_t=torch.tensor([[m_t]]).double(),
            m_s=torch.tensor([[m_s]]).double(),
            u=u,
        )
        assert policies.ancestral(seen)[0].double().mean().item() == pytest.approx(
            (m_t - m_s) / m_t, abs=1e-5
        )


# --- items 3 and 4: the bound ---------------------------------------------------------------------


def test_bound_of_the_perfect_network_is_the_likelihood():
    assert (exact_nelbo(Lookup(), SEQUENCES) + P.log()).abs().max() < 1e-10


def test_bound_of_an_imperfect_network():
    model = Lookup(blur=0.2)
    nelbo = exact_nelbo(model, SEQUENCES)
    assert (P * nelbo).sum().item() == pytest.approx(3.7346923253, abs=1e-9)
    assert nelbo[code(torch.tensor([0, 1, 2, 0]))].item() == pytest.approx(4.7418612289, abs=1e-9)
    # the law that the bound bounds: one token at a time in uniformly random order
    likelihood = torch.zeros(81, dtype=torch.float64)
    for order in itertools.permutations(range(L)):
        canvas, log_p = torch.full_like(SEQUENCES, MASK), torch.zeros(81, dtype=torch.float64)
        for i in order:
            log_p += model(canvas).log_softmax(-1)[torch.arange(81), i, SEQUENCES[:, i]]
            canvas[:, i] = SEQUENCES[:, i]
        likelihood += log_p.exp() / 24
    assert -(P * likelihood.log()).sum().item() == pytest.approx(3.7331650114, abs=1e-9)
    gap = nelbo + likelihood.log()
    assert gap.min() > 0 and gap.min().item() == pytest.approx(8.1e-6, rel=0.02)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bound_does_not_depend_on_the_schedule(name):
    """Integral over t of m'(t) / m(t) E[sum of CE] is the set form, for every schedule (40-node
    Gauss-Legendre)."""
    import numpy as np

    model, x0 = Lookup(blur=0.2), SEQUENCES[[15]]
    ce = torch.stack(
        [
            MASKED.weighted_ce(model, x0, Corruption(s[None], torch.tensor([1.0]).double()))[0] * L
            for s in SUBSETS
        ]
    )
    nodes, weights = np.polynomial.legendre.leggauss(40)
    t, w = torch.tensor(nodes / 2 + 0.5), torch.tensor(weights / 2)
    m, sizes = mask_ratio(name, t)[:, None], SUBSETS.sum(1)
    chance = m**sizes * (1 - m) ** (L - sizes)
    value = (w * mask_ratio_slope(name, t) / m[:, 0] * (chance * ce).sum(1)).sum().item()
    assert value == pytest.approx(exact_nelbo(model, x0).item(), abs=1e-9)


@pytest.mark.parametrize(
    "name, corruption, complementary",
    [
        *((name, corruption, False) for name in SCHEDULES for corruption in ("count", "bernoulli")),
        ("linear", "count", True),
    ],
)
def test_training_loss_is_an_unbiased_bound(name, corruption, complementary):
    """With elbo weights the loss averages to the bound, for every schedule, both kinds of
    corruption and masks in pairs."""
    cfg = settings(schedule=name, corruption=corruption, complementary=complementary)
    model = Lookup(blur=0.2)
    x0 = torch.tensor([[0, 1, 2, 0]]).expand(4000, L)
    means = torch.stack(
        [
            MASKED.weighted_ce(
                model, x0, family_of(cfg).corrupt((4000, L), generator(name, i))
            ).mean()
            * L
            for i in range(8)
        ]
    )
    assert abs(means.mean().item() - 4.7418612289) < 5 * means.std().item() / math.sqrt(8) + 1e-3


# T -> (E[L_T] - H, KL of the data from the law of T ancestral steps), linear grid
GAPS = {
    1: (0.580047, 0.5800),
    2: (0.277612, 0.1507),
    4: (0.135703, 0.0421),
    8: (0.067076, 0.0116),
    16: (0.033344, 0.0031),
    32: (0.016623, 0.0008),
    64: (0.008300, 0.0002),
}


@pytest.mark.parametrize("T", GAPS)
def test_discrete_time_loss_has_the_documented_gap(T):
    """Item 5's E[L_T] - H, with the weights that `draw_corruption` gives T discrete times on the
    linear schedule."""
    expected = GAPS[T][0]
    cfg = settings(corruption="bernoulli", diffusion_steps=T)
    drawn = family_of(cfg).corrupt((T, L), generator(8))  # stratified: each time once
    times = ((draws.stratified(T, generator(8)) * T).floor() + 1) / T
    model, total = Lookup(), 0.0
    # (15, 81)
    ce = torch.stack(
        [
            MASKED.weighted_ce(
                model, SEQUENCES, Corruption(s.expand(81, L), torch.ones(81).double())
            )
            * L
            for s in SUBSETS
        ]
    )
    for m, weight in zip(times.tolist(), drawn.weight.tolist()):
        chance = torch.tensor(
            [m**k * (1 - m) ** (L - k) for k in SUBSETS.sum(1).tolist()], dtype=torch.float64
        )
        total += weight / T * (chance[:, None] * ce * P).sum().item()
    assert total - ENTROPY == pytest.approx(expected, abs=1e-5)


def test_bound_estimator_is_unbiased_and_its_masks_are_fixed():
    model, x0 = Lookup(blur=0.2), SEQUENCES.repeat(50, 1)
    nll = MASKED.nelbo(model, x0, 4)
    assert torch.equal(nll, MASKED.nelbo(model, x0, 4)), "the same masks every time"
    per_sequence = nll.double().mean(1).view(50, 81).mean(0) * L
    estimate = (P * per_sequence).sum().item()
    spread = (P * (nll.double().mean(1).view(50, 81).var(0) / 50 * L**2).sqrt()).sum().item()
    assert abs(estimate - 3.7346923253) < 4 * spread
    # a row's own mean is unbiased too: its counts differ from pass to pass, so one row in many
    # passes is enough
    one = MASKED.nelbo(model, SEQUENCES[[15]].expand(64, L), 64) * L
    assert one.mean(1).std() < 0.3 * one.std(), "every row sees all counts"
    assert one.mean(1)[7].item() == pytest.approx(4.7418612289, abs=5 * one.std().item() / 8)
    mean, rows, masks = metrics.mean_and_errors(nll)
    assert mean == pytest.approx(nll.mean().item(), abs=1e-6) and 0 < masks < rows
    assert math.isnan(metrics.mean_and_errors(nll[:, :1])[2]), (
        "one pass does not tell the error over masks"
    )


def test_other_weightings():
    """flat is 1 a masked token, clip is elbo up to 5, pooled is the mean over all masked tokens of
    the batch."""
    for corruption in ("count", "bernoulli"):
        draw = lambda w: family_of(settings(loss_weighting=w, corruption=corruption)).corrupt(
            (64, 32), generator(9)
        )
        assert (draw("flat").weight == 1).all()
        torch.testing.assert_close(draw("clip").weight, draw("elbo").weight.clamp(max=5))
        assert draw("elbo").weight.max() > 5
        pooled = draw("pooled")
        assert (pooled.weight * pooled.masked.sum(1) / 32).mean().item() == pytest.approx(
            1, abs=1e-6
        )
    x0 = SEQUENCES[:8]
    full = family(loss_weighting="full").loss(
        Lookup(), x0, Corruption(torch.zeros(8, L, dtype=torch.bool), torch.ones(8))
    )
    assert full.abs().max() < 1e-12, "all visible: the loss over all positions is that of copying"


# --- item 5: the law of ancestral sampling --------------------------------------------------------


def ancestral_law(model, grid):
    """Exact law (81,) of ancestral sampling on a grid of mask ratios, by dynamic programming over
    all canvases."""
    p = model(CANVASES).softmax(-1)
    law = {(MASK,) * L: 1.0}
    for m_t, m_s in zip(grid[:-1], grid[1:]):
        chance, after = (m_t - m_s) / m_t, {}
        for canvas, mass in law.items():
            row = p[code(torch.tensor(canvas), 4)].tolist()
            options = [
                [(v, 1.0)]
                if v != MASK
                else [(MASK, 1 - chance)] + [(w, chance * q) for w, q in enumerate(row[i])]
                for i, v in enumerate(canvas)
            ]
            for choice in itertools.product(*options):
                weight = mass * math.prod(q for _, q in choice)
                if weight:
                    key = tuple(v for v, _ in choice)
                    after[key] = after.get(key, 0.0) + weight
        law = after
    out = torch.zeros(81, dtype=torch.float64)
    for key, mass in law.items():
        out[code(torch.tensor(key))] += mass
    return out


@pytest.mark.parametrize(
    "name, T, expected",
    [
        ("linear", 1, 0.432258),
        ("linear", 2, 0.221716),
        ("linear", 4, 0.112698),
        ("linear", 8, 0.056884),
        ("linear", 16, 0.028581),
        ("linear", 32, 0.014324),
        ("linear", 64, 0.007171),
        ("md4_cosine", 4, 0.129062),
        ("md4_cosine", 8, 0.065986),
        ("md4_cosine", 16, 0.033300),
        ("md4_cosine", 32, 0.016715),
        ("md4_cosine", 64, 0.008372),
    ],
)
def test_law_of_ancestral_sampling(name, T, expected):
    grid = mask_ratio(name, torch.linspace(1, 0, T + 1, dtype=torch.float64)).tolist()
    law = ancestral_law(Lookup(), grid)
    assert law.sum().item() == pytest.approx(1, abs=1e-12)
    assert total_variation(law, P) == pytest.approx(expected, abs=1e-6)
    if name == "linear" and T in GAPS:  # the discrete-time bound bounds what its own sampler writes
        kl = (P * (P / law).log()).sum().item()
        assert kl == pytest.approx(GAPS[T][1], abs=6e-5) and kl <= GAPS[T][0] + 1e-6


class Uniform:
    """Knows nothing, of a vocabulary of one."""

    vocab_size = 2

    def __call__(self, ids, noise_level=None, select=None):
        return torch.zeros(len(select), 1)


def many(sampler, n, model=None, **options):
    """n samples (n, 4) of the toy, and the NFE of a batch."""
    rows, nfe = [], 0
    for start in range(0, n, 20_000):
        size = min(20_000, n - start)
        canvas = torch.full((size, L), MASK)
        *_, last = sample(
            model or Lookup(), canvas, sampler=sampler, seeds=range(start, start + size), **options
        )
        rows.append(last.ids.clone())
        nfe = last.nfe
    return torch.cat(rows), nfe


@pytest.mark.parametrize("schedule", ("linear", "poly2"))
@pytest.mark.parametrize("T", (1, 2, 4))
def test_ancestral_sampler_follows_its_law(T, schedule):
    """The sampler itself, at so few steps that its law is far from the data's: total variation to
    the law is noise."""
    rows, _ = many("ancestral", 40_000, steps=T, schedule=schedule)
    law = ancestral_law(
        Lookup(), mask_ratio(schedule, torch.linspace(1, 0, T + 1, dtype=torch.float64)).tolist()
    )
    # 1.7 times the expected noise of 40,000 draws
    assert total_variation(empirical(rows), law) < 0.0255


def test_a_step_that_unmasks_nothing_costs_nothing():
    """Of T steps, ancestral takes T (1 - (1 - 1/T)^N) for N masks, in the mean."""
    *_, last = sample(Lookup(), torch.full((20_000, L), MASK), sampler="ancestral", steps=50)
    assert last.row_nfe.double().mean().item() == pytest.approx(
        50 * (1 - (1 - 1 / 50) ** L), abs=0.01
    )


def test_positions_are_chosen_before_the_distribution_is_truncated():
    """With top_k=1 every position would be sure of its token."""
    canvases = CANVASES[(CANVASES == MASK).sum(1) > 1]
    first = [
        next(iter(sample(Lookup(), canvases, sampler="confidence", top_k=k))).fresh for k in (0, 1)
    ]
    assert torch.equal(*first) and not torch.equal(
        first[0],
        policies.first(-torch.where(canvases == MASK, torch.arange(L), 99), torch.tensor(1)),
    ), "and not the leftmost"


# --- item 6: samplers against the data ------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler",
    (
        *(
            "first_hitting random confidence entropy margin threshold:1.1 "
            "entropy_bounded:0 factor:0 notes"
        ).split(),
    ),
)
def test_one_token_at_a_time_is_exact(sampler):
    rows, nfe = many(sampler, 60_000)
    assert total_variation(empirical(rows), P) < 0.0175 and nfe == L  # expected noise .0122


def test_ancestral_with_many_steps_is_nearly_exact():
    assert total_variation(empirical(many("ancestral", 60_000, steps=64)[0]), P) < 0.024


@pytest.mark.parametrize("steps, expected", ((2, 0.332791), (1, 0.432258)))
def test_several_tokens_at_a_time_err_by_the_documented_amount(steps, expected):
    rows, nfe = many("confidence", 200_000, steps=steps)
    assert (
        total_variation(empirical(rows), P) == pytest.approx(expected, abs=0.010) and nfe == steps
    )


def exact_law(sampler, steps):
    """Exact law (81,) of what `sampler` writes in so many steps with the perfect network, by
    dynamic programming.

    Written anew from the papers, with plain Python numbers and not with the policies' code. A state
    is the canvas, the confidence and the probability with which each token was drawn.
    """
    name, _, number = sampler.partition(":")
    table = conditionals()
    value = float(number or 0)

    def surest(p, i):
        row = sorted(p[i], reverse=True)
        entropy = -sum(q * math.log(q) for q in row)
        return {
            "entropy": -entropy,
            "entropy_bounded": -entropy,
            "local_entropy": -entropy,
            "margin": row[0] - row[1],
        }.get(name, row[0])

    def choices(state, k):
        """[(chance, positions to unmask, positions to remask)]"""
        canvas, confidence, chosen = state
        masked = [i for i in range(L) if canvas[i] == MASK]
        shown = [i for i in range(L) if canvas[i] != MASK]
        p = table[code(torch.tensor(canvas), 4)].tolist()
        key = {i: surest(p, i) for i in masked}
        order = sorted(masked, key=lambda i: -key[i])  # stable: the leftmost of equal ones
        m_t, m_s = 1 - k / steps, 1 - (k + 1) / steps
        due = max(1, math.floor(L * (1 - m_s) + 1e-9) - len(shown))
        if name in ("confidence", "entropy", "margin"):
            return [(1.0, order[:due], [])]
        if name in ("first_hitting", "random"):
            subsets = list(
                itertools.combinations(
                    masked, min(len(masked), 1 if name == "first_hitting" else due)
                )
            )
            return [(1 / len(subsets), list(s), []) for s in subsets]
        if name == "notes":
            return [(1.0, order[: max(1, len(masked) // (steps - k))], [])]
        if name == "threshold":
            return [(1.0, [i for n, i in enumerate(order) if n < due or key[i] >= value], [])]
        if name == "factor":
            n = next(
                (n for n, i in enumerate(order) if (n + 2) * (1 - key[i]) >= value), len(order)
            )
            return [(1.0, order[: max(n, due)], [])]
        if name == "entropy_bounded":
            sums = list(itertools.accumulate([0.0] + [-key[i] for i in order]))[:-1]
            n = next((n for n, total in enumerate(sums) if total > value), len(order))
            return [(1.0, order[: max(n, due)], [])]
        if name == "local_entropy":
            unmask, size = order[:due], int(value)
            for stretch in range(0, L, size):
                inside, total = [i for i in order if stretch <= i < stretch + size], 0.0
                for i in inside:
                    unmask = unmask + [i] * (total <= 0.1 and i not in unmask)
                    total -= key[i]
            return [(1.0, sorted(unmask), [])]
        if name == "remask":
            certain = sorted(range(L), key=lambda i: -(key[i] if i in key else confidence[i]))[
                : len(shown) + due
            ]
            return [
                (1.0, [i for i in masked if i in certain], [i for i in shown if i not in certain])
            ]
        # ReMDM: alpha is the visible share
        s, t = 1 - m_s, 1 - m_t
        if name == "remdm_loop":
            grid = lambda time: (
                time * 2 if time < 0.05 else 0.1 if time <= 0.55 else 1 - 0.9 * (1 - time) / 0.45
            )
            s, t = 1 - grid(m_s), 1 - grid(m_t)
        largest = min(1.0, (1 - s) / t) if t > 0 else 1.0
        if name == "remdm_conf":
            weights = {i: math.exp(-chosen[i]) for i in shown}
            sigma = {i: value * largest * w / sum(weights.values()) for i, w in weights.items()}
        else:
            one = {
                "remdm_cap": min(value, largest),
                "remdm_rescale": value * largest,
                "remdm_loop": min(value, largest) if s == t else 0.0,
            }[name]
            sigma = {i: one for i in range(L)}
        options = []
        for flips in itertools.product((False, True), repeat=L):
            chance = 1.0
            for i, flip in enumerate(flips):
                q = sigma[i] if i in shown else (s - (1 - sigma.get(i, 0.0)) * t) / (1 - t)
                chance *= q if flip else 1 - q
            if chance > 1e-15:
                options.append(
                    (chance, [i for i in masked if flips[i]], [i for i in shown if flips[i]])
                )
        return options

    law, k = {((MASK,) * L, (0.0,) * L, (0.0,) * L): 1.0}, 0
    while k < steps or any(MASK in canvas for canvas, _, _ in law):
        after = {}
        for state, mass in law.items():
            if MASK not in state[0] and (k >= steps or not name.startswith("remdm")):
                after[state] = after.get(state, 0.0) + mass
                continue
            p = table[code(torch.tensor(state[0]), 4)].tolist()
            for chance, unmask, remask in choices(state, k):
                for tokens in itertools.product(range(V), repeat=len(unmask)):
                    canvas, confidence, chosen = map(list, state)
                    weight = mass * chance
                    for i, token in zip(unmask, tokens):
                        weight *= p[i][token]
                        canvas[i], confidence[i], chosen[i] = token, max(p[i]), p[i][token]
                    for i in remask:
                        canvas[i] = MASK
                    # states that differ in what the policy does not look at are one
                    if not name.endswith("conf"):
                        chosen = [0.0] * L
                    if name != "remask":
                        confidence = [0.0] * L
                    key = tuple(canvas), tuple(confidence), tuple(chosen)
                    after[key] = after.get(key, 0.0) + weight
        law, k = after, k + 1
    out = torch.zeros(81, dtype=torch.float64)
    for (canvas, _, _), mass in law.items():
        out[code(torch.tensor(canvas))] += mass
    return out


@pytest.mark.parametrize(
    "sampler, steps, expected",
    (
        ("remdm_cap:0.02", 4, 0.1125),
        ("remdm_cap:0.1", 4, 0.1130),
        ("remdm_cap:0.02", 16, 0.0286),
        ("remdm_cap:0.1", 16, 0.0353),
        ("confidence", 2, 0.332791),
        ("confidence", 1, 0.432258),
    ),
)
def test_documented_laws(sampler, steps, expected):
    law = exact_law(sampler, steps)
    assert law.sum().item() == pytest.approx(1, abs=1e-9)
    assert total_variation(law, P) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(
    "sampler, steps",
    [
        ("confidence", 2),
        ("confidence", 3),
        ("entropy", 2),
        ("margin", 2),
        ("random", 2),
        ("first_hitting", 2),
        ("notes", 3),
        ("threshold:0.5", 4),
        ("threshold:0.55", 4),
        ("factor:1.2", 4),
        ("entropy_bounded:0.9", 4),
        ("local_entropy:2", 4),
        ("local_entropy:3", 4),
        ("local_entropy:1", 4),
        ("remask", 2),
        ("remask", 3),
        ("remdm_cap:0.3", 3),
        ("remdm_rescale:0.5", 3),
        ("remdm_conf:1", 3),
        ("remdm_loop:0.1", 4),
    ],
)
def test_samplers_follow_their_laws(sampler, steps):
    """Total variation to the exact law is noise; the chosen cases are those where policies differ
    from each other."""
    rows, _ = many(sampler, 40_000, steps=steps)
    law = exact_law(sampler, steps)
    assert law.sum().item() == pytest.approx(1, abs=1e-9)
    # expected noise .015 for the data's entropy
    assert total_variation(empirical(rows), law) < 0.0225


def test_confidence_of_the_drawn_token_is_wrong():
    """Negative control: choosing the position by the probability of the token drawn there (LLaDA,
    Fast-dLLM, the micro-dLLMs) collapses the distribution, which is why `max_probability` is of the
    distribution."""
    model, n = Lookup(), 20_000
    ids = torch.full((n, L), MASK)
    for k in range(L):
        p = model(ids).softmax(-1)
        tokens = draws.draw(
            p.flatten(0, 1), torch.rand(n * L, dtype=torch.float64, generator=generator(10, k))
        )
        drawn = p.flatten(0, 1).gather(1, tokens[:, None]).view(n, L).masked_fill(ids != MASK, -1)
        best = drawn.argmax(1, keepdim=True)
        ids.scatter_(1, best, tokens.view(n, L).gather(1, best))
    q = empirical(ids)
    assert total_variation(q, P) > 0.5
    assert -(q * q.clamp(min=1e-12).log()).sum().item() == pytest.approx(1.69, abs=0.1)


# --- items 10 and 11: invariants and precision ----------------------------------------------------

CANVAS = torch.tensor([[0, MASK, MASK, MASK], [MASK, 1, MASK, 2], [MASK] * 4, [0, 1, 2, 0]])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", (1, 2, 3, 4, 9))
def test_sampler_invariants(sampler, steps):
    model, before = Lookup(blur=0.2), CANVAS.clone()
    previous = CANVAS
    seen = torch.zeros_like(CANVAS)
    for step in sample(model, CANVAS, sampler=sampler, steps=steps):
        assert (step.ids[CANVAS != MASK] == CANVAS[CANVAS != MASK]).all(), (
            "given tokens never change"
        )
        assert torch.equal(step.masked, step.ids == MASK)
        assert not (step.fresh & (previous != MASK)).any(), "what is visible is carried over"
        assert not (step.remasked & ((previous == MASK) | (CANVAS != MASK))).any(), (
            "only written tokens are masked"
        )
        assert ((step.ids == previous) | step.fresh | step.remasked).all()
        assert step.nfe == model.nfe, "the NFE reported is what was called"
        seen += step.fresh.long() - step.remasked.long()
        previous = step.ids.clone()
    assert not step.masked.any() and step.ids.max() < MASK, "no MASK is left and none was drawn"
    assert torch.equal(CANVAS, before), "the caller's canvas is untouched"
    assert torch.equal(seen, (CANVAS == MASK).long()), (
        "every masked token is written once more than masked"
    )
    assert model.nfe <= steps or sampler == "first_hitting" and model.nfe == L
    if SAMPLERS[sampler].key is not None and SAMPLERS[sampler].value is None:
        assert model.nfe == min(steps, 4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "options", ({}, {"steps": 2}, {"temperature": 0}, {"temperature": 0.7, "top_p": 0.9})
)
def test_a_row_does_not_depend_on_its_batch(sampler, options):
    *_, together = sample(Lookup(), CANVAS, sampler=sampler, seeds=[3, 1, 4, 1], **options)
    for row, seed in enumerate([3, 1, 4, 1]):
        last = None
        for last in sample(
            Lookup(), CANVAS[row : row + 1], sampler=sampler, seeds=[seed], **options
        ):
            pass
        alone = CANVAS[row] if last is None else last.ids[0]
        assert torch.equal(alone, together.ids[row])


def test_a_complete_canvas_needs_no_evaluation():
    model = Lookup()
    assert list(sample(model, CANVAS[3:])) == [] and model.nfe == 0


def test_finished_rows_cost_nothing():
    model = Lookup()
    list(sample(model, CANVAS, sampler="confidence"))
    assert model.rows == int((CANVAS == MASK).sum())


def test_noise_level_is_the_true_share_of_masks():
    model = Lookup()
    list(sample(model, CANVAS[:1], sampler="confidence", steps=2))
    assert [round(level.item(), 6) for level in model.levels] == [0.75, 0.5]


def test_temperature_zero_is_greedy():
    """Always the likeliest token, at the surest position first; the limit of small temperatures."""
    *_, cold = sample(Lookup(), CANVAS[:3], temperature=0, seeds=[1, 2, 3])
    *_, nearly = sample(Lookup(), CANVAS[:3], temperature=1e-4, seeds=[4, 5, 6])
    assert torch.equal(cold.ids, nearly.ids)
    assert cold.ids[2].tolist() == [0, 0, 0, 0]


def test_balanced_counts():
    """N masks in T steps: N // T or one more each, N in all; more steps than masks are one each."""
    for N, T in ((128, 100), (128, 50), (7, 3), (5, 9)):
        counts = [
            int(step.fresh.sum())
            for step in sample(
                Uniform(), torch.ones(1, N, dtype=torch.long), sampler="confidence", steps=T
            )
        ]
        assert sum(counts) == N and len(counts) == min(N, T)
        assert max(counts) - min(counts) <= 1


def test_truncate():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert draws.truncate(logits, top_k=2)[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])
    kept = draws.truncate(logits, top_p=0.6)[0]
    assert (kept > 0).tolist() == [True, True, False, False], "the token that crosses top_p is kept"
    assert (draws.truncate(logits, top_p=0.5)[0] > 0).tolist() == [True, False, False, False]
    assert draws.truncate(logits, temperature=0)[0].tolist() == [1, 0, 0, 0]
    assert draws.truncate(logits, temperature=0.5)[0].tolist() == pytest.approx(
        [p / 0.365 for p in (0.25, 0.09, 0.0225, 0.0025)]
    )


def test_a_token_of_probability_zero_is_never_drawn():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    u = torch.cat(
        (
            torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64),
            torch.linspace(0, 1, 1001).double()[:-1],
        )
    )
    assert set(draws.draw(p.expand(len(u), -1), u).tolist()) == {1, 3}


class Tail:
    """Half of the mass on one token, half on V equal tail tokens, at every position."""

    def __init__(self, V):
        self.vocab_size = V + 2
        self.logits = torch.cat((torch.tensor([0.5]), torch.full((V,), 0.5 / V))).log()

    def __call__(self, ids, noise_level=None, select=None):
        return self.logits.expand(len(select), -1)


def test_two_stage_draw_keeps_the_tail():
    """Item 11: with T = 1000 steps the tail of 2,000 tokens keeps its half of the mass."""
    canvas = torch.full((8, 5000), 2001)
    *_, last = sample(Tail(2000), canvas, sampler="ancestral", steps=1000)
    assert (last.ids > 0).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_one_stage_float32_draw_loses_the_tail():
    """Negative control: drawing from the mixture with MASK by float32 Gumbel noise, as MDLM's first
    code did, in a step of T = 10,000. The largest of 2,000 float32 uniforms is floor(2^24
    v^(1/2000)) / 2^24, drawn directly.

    Noise above the largest float32 value piles up there, so the loss is less than if it vanished
    (share .085), but the tail keeps about a fifth instead of a half. In float64, through the same
    race, it keeps its half.
    """
    V, u, n = 2000, 1e-4, 10_000_000

    def share(digits, dtype):
        random = generator(11)
        uniform = lambda: torch.rand(n, generator=random, dtype=torch.float64)
        race = lambda p, v: math.log(p) - torch.log(-torch.log(v.to(dtype)))
        tail = race(u * 0.5 / V, (uniform() ** (1 / V) * 2**digits).floor() / 2**digits)
        first, mask = race(u * 0.5, uniform()), race(1 - u, uniform())
        tail_wins, first_wins = ((a > b) & (a > mask) for a, b in ((tail, first), (first, tail)))
        return (tail_wins.sum() / (tail_wins.sum() + first_wins.sum())).item()

    assert share(24, torch.float32) < 0.3
    assert share(53, torch.float64) == pytest.approx(0.5, abs=0.06)


def test_row_uniforms_are_uniform_and_independent():
    u = draws.row_uniforms(torch.arange(500), 3, 100)
    assert u.min() >= 0 and u.max() < 1
    assert (
        abs(u.mean().item() - 0.5) < 4 / math.sqrt(12 * u.numel())
        and abs(u.var().item() * 12 - 1) < 0.02
    )
    later = draws.row_uniforms(torch.arange(500), 4, 100)
    columns = torch.stack(
        [
            u[0].flatten(),
            u[1].flatten(),
            later[0].flatten(),
            u[0].roll(1, 0).flatten(),
            u[0].roll(1, 1).flatten(),
        ]
    )
    correlation = torch.corrcoef(columns) - torch.eye(5)
    assert correlation.abs().max() < 5 / math.sqrt(columns.size(1))


@pytest.mark.parametrize("sampler", ("remdm_cap:0.1", "remdm_cap:0.9", "remdm_rescale:0.7"))
def test_remasking_keeps_the_marginals(sampler):
    """(1 - sigma) alpha_t + (1 - alpha_t) u = alpha_s for every step of the grid, whatever sigma is
    (ReMDM)."""
    found = policies.find_sampler(sampler)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5)[None] / 100_000
    yes, no = torch.ones_like(u, dtype=torch.bool), torch.zeros_like(u, dtype=torch.bool)
    for t, s in ((1.0, 0.8), (0.8, 0.5), (0.5, 0.45), (0.1, 0.0)):  # mask ratios
        ratios = dict(
            m_t=torch.tensor([[t]]).double(),
            m_s=torch.tensor([[s]]).double(),
            u=u,
            value=found.value,
        )
        unmasked = found.policy(view(open=yes, unmasked=no, **ratios))[0].double().mean().item()
        remasked = found.policy(view(open=no, unmasked=yes, **ratios))[1].double().mean().item()
        assert (1 - remasked) * (1 - t) + t * unmasked == pytest.approx(1 - s, abs=2e-5)
    assert remasked == 0 and unmasked == 1, "the last step leaves nothing masked"


def test_loop_grid():
    assert policies.loop_grid(
        torch.tensor([1.0, 0.775, 0.55, 0.3, 0.05, 0.025, 0.0])
    ).tolist() == pytest.approx([1, 0.55, 0.1, 0.1, 0.1, 0.05, 0])


def test_counts_of_the_notes():
    """max(1, masks // steps left) has no final jump: of 128 tokens in 100 steps, one each, then two
    each."""
    counts = [
        int(step.fresh.sum())
        for step in sample(
            Uniform(), torch.ones(1, 128, dtype=torch.long), sampler="notes", steps=100
        )
    ]
    assert counts == [1] * 72 + [2] * 28


# --- blocks, guidance, caches, long texts ---------------------------------------------------------


def documents_of(model, canvas, **options):
    """The ids that the sampler ends with, (B, L), and the NFE."""
    *_, last = sample(model, canvas, **options)
    return last.ids.clone(), last.nfe


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_block_is_no_block(sampler):
    for size in (4, 9):
        assert torch.equal(
            documents_of(Lookup(), CANVAS, sampler=sampler, decode_block=size)[0],
            documents_of(Lookup(), CANVAS, sampler=sampler)[0],
        )


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("size", (1, 2, 3))
def test_blocks_are_denoised_left_to_right(sampler, size):
    """Each row counts its blocks from its own first MASK, and no block begins before the last one
    is complete."""
    first = (CANVAS == MASK).int().argmax(1)
    number = (torch.arange(L) - first[:, None]).clamp(min=0) // size
    for step in sample(Lookup(blur=0.3), CANVAS, sampler=sampler, decode_block=size, steps=6):
        begun = ((CANVAS == MASK) & ~step.masked) | step.remasked
        for row in range(len(CANVAS)):
            open_blocks, begun_blocks = number[row][step.masked[row]], number[row][begun[row]]
            if len(open_blocks) and len(begun_blocks):
                assert begun_blocks.max() <= open_blocks.min()
    assert not step.masked.any()


@pytest.mark.parametrize("size", (1, 2))
def test_one_token_at_a_time_in_blocks_is_exact(size):
    rows, nfe = many("confidence", 60_000, decode_block=size)
    assert total_variation(empirical(rows), P) < 0.0175 and nfe == L


def test_blocks_share_the_steps():
    """4 steps for 8 tokens are one step a block of two."""
    counts = [
        step.fresh[0].nonzero()[:, 0].tolist()
        for step in sample(Uniform(), torch.ones(1, 8, dtype=torch.long), steps=4, decode_block=2)
    ]
    assert counts == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_least_tokens_a_step():
    _, nfe = documents_of(Lookup(), CANVAS[2:3], sampler="threshold:1.1", min_tokens=3)
    assert nfe == 2


def test_policies_that_look_at_the_data_keep_to_the_steps():
    for sampler in ("threshold:1.1", "factor:0", "entropy_bounded:0"):
        assert documents_of(Lookup(), CANVAS[2:3], sampler=sampler, steps=2)[1] == 2
    for sampler in ("threshold:0", "factor:99", "entropy_bounded:99"):
        assert documents_of(Lookup(), CANVAS[2:3], sampler=sampler)[1] == 1


def test_guidance():
    """(1 + w) times the logits with the prompt, minus w times those without; w = 0 is off; two
    NFE a step."""
    prompted = torch.tensor([[0, 2, MASK, MASK]])
    plain, nfe = documents_of(Lookup(), prompted, seeds=[5])
    assert (
        torch.equal(documents_of(Lookup(), prompted, seeds=[5], guidance=1e-9)[0], plain)
        and nfe == 2
    )
    assert documents_of(Lookup(), torch.full((1, L), MASK), guidance=1.0)[1] == L, (
        "without a prompt there is nothing to guide"
    )
    w, seen = 0.7, []
    for step in sample(Lookup(), prompted.expand(50_000, L), sampler="first_hitting", guidance=w):
        seen.append(step)
        break
    ids = seen[0].ids
    table = conditionals()
    for position in (2, 3):
        rows = ids[:, position] != MASK
        both = [
            table[code(torch.tensor(c), 4)][position].log()
            for c in ([0, 2, MASK, MASK], [MASK] * 4)
        ]
        expected = ((1 + w) * both[0] - w * both[1]).softmax(-1)
        share = torch.bincount(ids[rows, position], minlength=3).double() / rows.sum()
        assert (share - expected).abs().max() < 0.012
    assert seen[0].nfe == 2
    step = next(iter(sample(Lookup(), prompted, guidance=w, rows="document", top=3, seeds=[1])))
    both = [
        table[code(torch.tensor(c), 4)][3].log()
        for c in ([0, 2, MASK, MASK], [0, MASK, MASK, MASK])
    ]
    expected = ((1 + w) * both[0] - w * both[1]).softmax(-1).sort(descending=True).values
    assert torch.allclose(step.top[1][0, 3].double(), expected), "what is no prompt stays in sight"


def test_alternatives_are_the_likeliest():
    step = next(iter(sample(Lookup(), torch.tensor([[MASK, 1, MASK, 0]]), top=2)))
    tokens, p = step.top
    assert tokens[0, 0].tolist() == [1, 0] and p[0, 0].tolist() == pytest.approx(
        [0.545455, 0.303030], abs=1e-6
    )
    assert tokens[0, 2].tolist() == [2, 0] and p[0, 2].tolist() == pytest.approx(
        [0.365854, 0.341463], abs=1e-6
    )
    assert p[0, 1].sum() == 0, "not asked for"


def network(seq_len=24, vocab_size=11, **changes):
    return toy.network(vocab_size, 3, seq_len=seq_len, **changes)


class Watched:
    """The small network, which puts the ids that it is given into the list `seen`."""

    vocab_size = 11

    def __init__(self, seen):
        self.model, self.seen = network(), seen

    def __call__(self, ids, *args, **kwargs):
        self.seen.append(ids.clone())
        return self.model(ids, *args, **kwargs)


REAL = torch.tensor([[3, 4] + [10] * 20 + [5, 6], [3] + [10] * 23, [10] * 12 + [1] * 5 + [10] * 7])


@pytest.mark.parametrize("cache", ("prefix", "dual"))
@pytest.mark.parametrize("sampler", ("confidence", "threshold:0.5", "ancestral", "remdm_cap:0.2"))
def test_a_cache_that_is_always_refreshed_changes_nothing(cache, sampler):
    model = network()
    options = dict(sampler=sampler, decode_block=6, steps=16, seeds=[1, 2, 3])
    assert torch.equal(
        documents_of(model, REAL, cache=cache, cache_refresh=1, **options)[0],
        documents_of(model, REAL, **options)[0],
    )


@pytest.mark.parametrize("cache", ("prefix", "dual"))
@pytest.mark.parametrize("sampler", ("confidence", "threshold:0.5", "ancestral", "remdm_cap:0.2"))
@pytest.mark.parametrize("refresh", (0, 2))
def test_a_row_with_a_cache_does_not_depend_on_its_batch(cache, sampler, refresh):
    """Also for policies whose first step in a block writes nothing, and rows whose blocks begin in
    different places."""
    model = network()
    options = dict(sampler=sampler, decode_block=6, steps=40, cache=cache, cache_refresh=refresh)
    together, _ = documents_of(model, REAL, seeds=[1, 2, 3], **options)
    for row, seed in enumerate((1, 2, 3)):
        assert torch.equal(
            documents_of(model, REAL[row : row + 1], seeds=[seed], **options)[0][0], together[row]
        )


@pytest.mark.parametrize("cache", ("prefix", "dual"))
def test_a_cache_computes_less_and_is_exact_at_first(cache):
    """The first step of a block is the uncached one, later ones see stale keys; fewer positions are
    computed."""
    seen = []

    options = dict(sampler="confidence", decode_block=8, seeds=[1], top=3)
    cached = [s.top[1].clone() for s in sample(Watched(seen), REAL[1:2], cache=cache, **options)]
    plain = [s.top[1].clone() for s in sample(network(), REAL[1:2], **options)]
    assert torch.allclose(cached[0], plain[0]) and not torch.allclose(cached[5], plain[5])
    widths = [ids.size(1) for ids in seen]
    assert widths[0] == 24 and widths[1] == (23 if cache == "prefix" else 8)
    assert sorted(set(widths)) == ([7, 15, 23, 24] if cache == "prefix" else [8, 24])
    rows = documents_of(network(), REAL, sampler="confidence", cache=cache, decode_block=8)[0]
    assert rows.max() < 10 and torch.equal(rows[REAL != 10], REAL[REAL != 10])


def test_texts_longer_than_the_window():
    """Each block is written with as much of the text before it as fits; the network never sees more
    than its window."""
    seen = []

    canvas = torch.full((1, 60), 10)
    canvas[0, :3] = torch.tensor([1, 2, 3])
    ids, _ = documents_of(Watched(seen), canvas, decode_block=8, window=24, rows="document")
    assert ids.max() < 10 and ids.size(1) == 60 and ids[0, :3].tolist() == [1, 2, 3]
    assert all(x.size(1) == 24 for x in seen)
    last = seen[-1][0]
    assert last[0] == 1, "what every row begins with stays in sight"
    assert torch.equal(last[1:-8], ids[0, 37:52]), "the text before the last block"
    with pytest.raises(UserError, match="longer than the window"):
        documents_of(network(), canvas, window=24, decode_block=24)
    plain = documents_of(network(), canvas, window=24)[0]
    assert torch.equal(plain, documents_of(network(), canvas, window=24, decode_block=6)[0]), (
        "a quarter of the window by default"
    )


@pytest.mark.parametrize("block", (4, 12, 20, 22, 23))
@pytest.mark.parametrize("rows", ("stream", "document"))
@pytest.mark.parametrize(
    "options",
    ({}, {"cache": "dual"}, {"cache": "prefix"}, {"guidance": 0.5}, {"sampler": "ancestral"}),
)
def test_the_block_is_always_in_the_window(block, rows, options):
    """Whatever its size, with given text behind it, with caches and guidance."""
    canvas = torch.full((2, 60), 10)
    canvas[:, :3], canvas[0, -4:] = torch.tensor([1, 2, 3]), torch.tensor([7, 7, 8, 8])
    ids, _ = documents_of(
        network(), canvas, decode_block=block, window=24, rows=rows, steps=20, **options
    )
    assert ids.max() < 10 and torch.equal(ids[canvas != 10], canvas[canvas != 10])


def test_a_row_that_has_ended_is_filled_up():
    class Ends:
        """Says token 0 at position 5 and token 1 elsewhere."""

        vocab_size, rows = 4, 0

        def __call__(self, ids, noise_level=None, select=None):
            self.rows += 1
            logits = torch.full((*ids.shape, 3), -1e4)
            logits[..., 1] = 0
            logits[:, 5] = torch.tensor([0.0, -1e4, -1e4])
            return logits.flatten(0, 1)[select]

    canvas = torch.full((1, 20), 3)
    *_, last = steps = list(sample(Ends(), canvas, sampler="confidence", decode_block=4, stop=0))
    assert last.ids[0].tolist() == [1] * 5 + [0] + [1, 1] + [0] * 12 and len(steps) == 8
    assert (
        documents_of(Ends(), canvas, sampler="confidence", decode_block=4)[0][0].tolist()
        == [1] * 5 + [0] + [1] * 14
    )


def test_ending_early_leaves_later_given_text_and_the_last_state_alone():
    class Ends:
        vocab_size = 4

        def __call__(self, ids, noise_level=None, select=None):
            return torch.tensor([[0.0, -1e4, -1e4]]).expand(len(select), 3)

    canvas = torch.tensor([[1] + [3] * 4 + [2] + [3] * 4 + [2] + [3] * 6])
    for sampler in ("confidence", "remdm_cap:0.5"):
        *_, last = sample(Ends(), canvas, decode_block=4, stop=0, sampler=sampler, steps=30)
        assert not last.masked.any() and torch.equal(last.ids[canvas != 3], canvas[canvas != 3])
    steps = list(sample(Ends(), canvas, sampler="confidence", decode_block=4, stop=0))
    assert len(steps) > 8, "an end before given text ends nothing"


def test_long_texts_look_ahead_to_given_text():
    seen = []

    canvas = torch.cat((torch.full((1, 56), 10), torch.tensor([[7, 7, 8, 8]])), 1)
    documents_of(Watched(seen), canvas, decode_block=8, window=24)
    assert torch.equal(seen[-1][0, -4:], canvas[0, -4:]), "the last block sees the suffix"
    assert (seen[0][0] == 10).all()


def test_sampler_names():
    assert (
        policies.find_sampler("threshold:0.7").value == 0.7
        and policies.find_sampler("threshold").value == 0.9
    )
    for wrong, message in (
        ("tresh", "did you mean threshold"),
        ("threshold:x", "expected a number"),
        ("confidence:1", "takes no number"),
        ("factor:-1", "expected a number"),
        ("remdm_cap:2", "at most 1"),
    ):
        with pytest.raises(UserError, match=message):
            policies.find_sampler(wrong)
