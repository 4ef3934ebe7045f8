"""Uniform, block and autoregressive models against exact answers, through the code that trains and
samples them.

Expected values are those of the design's mathematics document, section 5, items 5 to 8; the item is
named at each test.
"""

import itertools
import math

import pytest
import torch
import toy
from test_maths import SUBSETS, empirical, total_variation
from test_uniform import exact_uniform_nelbo
from toy import CANVASES, MASK, MASKED, SEQUENCES, L, Lookup, P, V, code, family, sample, settings

import diffusion
from utils import blocks, importance
from utils.cli import UserError
from utils.families import family_of
from utils.runtime import generator
from utils.settings import family_defaults

ROWS = ("stream", "document")  # without and with a BOS token
ROW = code(torch.tensor([0, 1, 2, 0])).item()


def network(vocab_size=6, **changes):
    return toy.network(vocab_size, 5, torch.float64, **changes)


# --- autoregressive -------------------------------------------------------------------------------


class Causal:
    """Of the toy: position i, which reads tokens 0..i-1 (the first MASK), knows p(x_i | x_<i);
    blurred if asked."""

    vocab_size = V + 1

    def __init__(self, blur=0.0):
        self.lookup = Lookup(blur)

    def __call__(self, ids, noise_level=None, attention=None, select=None):
        assert attention == "causal" and (ids[:, 0] == MASK).all()
        out = []
        for i in range(L):
            canvas = torch.full((len(ids), L), MASK)
            canvas[:, :i] = ids[:, 1 : i + 1]
            out.append(self.lookup(canvas)[:, i])
        logits = torch.stack(out, 1)
        return logits if select is None else logits.flatten(0, 1)[select]


def test_ar_is_the_exact_likelihood():
    nll = family_of(settings(objective="ar")).nelbo(Causal(), SEQUENCES, 1) * L
    assert nll.shape == (81, 1)
    torch.testing.assert_close(nll[:, 0].double(), -P.log(), atol=1e-6, rtol=0)
    blurred = (
        family_of(settings(objective="ar")).nelbo(Causal(0.2), SEQUENCES, 1)[:, 0].double() * L
    )
    assert (P * blurred).sum().item() == pytest.approx(3.7295673421, abs=1e-6)


@pytest.mark.parametrize("rows, bos", (("stream", 0), ("document", 1)))
def test_ar_scores_equal_a_plain_loop(rows, bos):
    """Token by token, each from the MASK and the tokens before it; a given first token costs
    nothing."""
    model, cfg = network(), settings(objective="ar", rows=rows)
    x0 = torch.randint(5, (3, 9), generator=torch.Generator().manual_seed(1))
    total = torch.zeros(3, dtype=torch.float64)
    for i in range(bos, 9):
        seen = torch.cat((torch.full((3, 1), 5), x0[:, :i]), 1)
        total -= model(seen, attention="causal")[:, -1].log_softmax(-1)[torch.arange(3), x0[:, i]]
    torch.testing.assert_close(
        family_of(cfg).nelbo(model, x0, 1)[:, 0].double() * 9, total, atol=1e-5, rtol=1e-6
    )


def test_ar_does_not_see_what_it_predicts():
    model, cfg = network(), settings(objective="ar")
    x0 = torch.zeros(5, 9, dtype=torch.long)
    x0[1:, 4] = torch.arange(1, 5)
    logits = family_of(cfg).logits(model, x0)
    assert (logits[:, :5] == logits[:1, :5]).all() and not torch.equal(logits[0, 5], logits[1, 5])


# --- item 8: blocks -------------------------------------------------------------------------------


class Blocks:
    """Of the toy: what a network of blocks of n tokens knows of [corrupted ; clean], or of a canvas
    in sampling."""

    vocab_size = V + 1

    def __init__(self, n, blur=0.0):
        self.n, self.lookup = n, Lookup(blur)

    def __call__(self, ids, noise_level=None, attention=None, positions=None, select=None):
        noisy, clean, doubled = ids[:, :L], ids[:, -L:], ids.size(1) == 2 * L
        out = []
        for start in range(0, L, self.n):
            canvas = torch.full((len(ids), L), MASK)
            canvas[:, :start] = clean[:, :start]
            canvas[:, start : start + self.n] = noisy[:, start : start + self.n]
            out.append(self.lookup(canvas)[:, start : start + self.n])
        logits = torch.cat(out, 1)
        logits = torch.cat((logits, torch.zeros_like(logits)), 1) if doubled else logits
        return logits if select is None else logits.flatten(0, 1)[select]


def exact_block_nelbo(model, x0, n):
    """All masks of each block enumerated: sum over S of 1 / (|S| C(n, |S|)) sum of CE over S; (81,)
    nats."""
    total = torch.zeros(len(x0), dtype=torch.float64)
    for block in range(L // n):
        for subset in itertools.product((False, True), repeat=n):
            if any(subset):
                masked = torch.zeros(len(x0), L, dtype=torch.bool)
                masked[:, block * n : (block + 1) * n] = torch.tensor(subset)
                weight = torch.zeros(len(x0), L // n, dtype=torch.float64)
                weight[:, block] = 1 / sum(subset) / math.comb(n, sum(subset))
                total += (
                    family(block_len=n).weighted_ce(model, x0, diffusion.Corruption(masked, weight))
                    * L
                )
    return total


@pytest.mark.parametrize("n, expected", ((1, 3.7295673421), (2, 3.7333134174), (4, 3.7346923253)))
def test_bound_of_blocks(n, expected):
    assert (P * exact_block_nelbo(Blocks(n, 0.2), SEQUENCES, n)).sum().item() == pytest.approx(
        expected, abs=1e-9
    )
    assert (exact_block_nelbo(Blocks(n), SEQUENCES, n) + P.log()).abs().max() < 1e-10


@pytest.mark.parametrize("n", (1, 2))
@pytest.mark.parametrize("name", ("linear", "cos", "poly2"))
def test_block_training_loss_is_an_unbiased_bound(n, name):
    cfg, model = settings(block_len=n, seq_len=L, schedule=name), Blocks(n, 0.2)
    x0 = SEQUENCES[[ROW]].expand(2000, L)
    draw = lambda i: family_of(cfg).corrupt((2000, L), generator(name, i))
    means = torch.stack([family_of(cfg).loss(model, x0, draw(i)).mean() * L for i in range(8)])
    exact = exact_block_nelbo(Blocks(n, 0.2), SEQUENCES[[ROW]], n).item()
    assert abs(means.mean().item() - exact) < 5 * means.std().item() / math.sqrt(8) + 1e-3
    if n == 1:
        assert means.std() < 1e-6, "one token a block is always masked: no noise"
    counts = draw(0).masked.view(2000, -1, n).sum(2)
    assert counts.min() == 1 and counts.max() == n, "each block has its own count, at least one"
    for block in counts.double().T:
        assert block.mean().item() == pytest.approx(counts.double().mean().item(), abs=0.05), (
            "wherever it stands"
        )


def test_block_bound_estimator():
    cfg = settings(block_len=2, seq_len=L)
    nll = (
        family_of(cfg)
        .nelbo(Blocks(2, 0.2), SEQUENCES.repeat(30, 1), 4)
        .double()
        .mean(1)
        .view(30, 81)
        .mean(0)
        * L
    )
    assert (P * nll).sum().item() == pytest.approx(3.7333134174, abs=0.01)


def test_a_block_as_large_as_the_window_is_plain_diffusion():
    cfg = settings(block_len=12, seq_len=12)
    assert family_of(cfg).block_len == 0
    model, x0 = network(), torch.randint(5, (4, 12), generator=torch.Generator().manual_seed(1))
    corruption = family_of(settings()).corrupt((4, 12), generator(1))
    one = corruption._replace(weight=corruption.weight[:, None])
    torch.testing.assert_close(
        family(block_len=12).weighted_ce(model, x0, one), MASKED.weighted_ce(model, x0, corruption)
    )
    torch.testing.assert_close(
        family(block_len=12).nelbo(model, x0, 2), MASKED.nelbo(model, x0, 2), atol=1e-12, rtol=1e-12
    )


def doubled(model, xt, x0, n, bos=0):
    """Logits of the corrupted half in training."""
    size = xt.size(1)
    level = blocks.mask_ratios(xt == 5, n, bos)
    return model(
        torch.cat((xt, x0), 1),
        torch.cat((level, torch.zeros_like(level)), 1),
        attention=blocks.doubled_attention(size, n, bos, xt.device),
        positions=torch.arange(size).repeat(2),
    )[:, :size]


@pytest.mark.parametrize("bos", (0, 1))
def test_who_sees_whom_in_block_training(bos):
    """A change of the corrupted tokens of a block reaches that block alone, one of the clean tokens
    later blocks alone; exactly, and by gradients too."""
    model, n = network(), 3
    size = bos + 12
    x0 = torch.randint(5, (1, size), generator=torch.Generator().manual_seed(1))
    xt = x0.masked_fill(torch.rand(1, size, generator=torch.Generator().manual_seed(2)) < 0.5, 5)
    xt[:, :bos] = x0[:, :bos]
    before, own = doubled(model, xt, x0, n, bos), blocks.block_ids(size, n, bos, xt.device)
    for i in range(bos, size):
        noisy, clean = xt.clone(), x0.clone()
        noisy[0, i], clean[0, i] = (noisy[0, i] + 1) % 6, (clean[0, i] + 1) % 5
        by_noisy = (doubled(model, noisy, x0, n, bos) != before).any(-1)[0]
        by_clean = (doubled(model, xt, clean, n, bos) != before).any(-1)[0]
        assert by_noisy.equal(own == own[i]) and by_clean.equal(own > own[i])
    inputs = []
    hook = model.embedding.register_forward_hook(
        lambda module, args, out: inputs.append(out) or out.retain_grad()
    )
    doubled(model, xt, x0, n, bos)[0, bos + 4].sum().backward()  # of block 1
    hook.remove()
    felt = inputs[0].grad[0].abs().sum(-1) > 0
    assert felt[:size].equal(own == 1) and felt[size:].equal(own < 1)


@pytest.mark.parametrize("sampler", ("remdm_cap:0.4", "remdm_rescale", "remdm_conf", "remdm_loop"))
@pytest.mark.parametrize("kind", ({"objective": "ar"}, {"block_len": 4}))
def test_remasking_policies_with_exact_keys(kind, sampler):
    """A block that is full is asked again, which autoregressive models did not survive."""
    model, canvas = network(), torch.full((2, 12), 5)
    canvas[:, :2] = torch.tensor([1, 2])
    for window, steps in ((None, 30), (8, 30), (None, 7)):
        exact, anew = (
            [
                (step.ids.tolist(), step.remasked.tolist(), step.row_nfe.tolist())
                for step in sample(
                    model, canvas, sampler=sampler, cache=cache, window=window, steps=steps, **kind
                )
            ]
            for cache in ("auto", "none")
        )
        assert exact == anew and exact


@pytest.mark.parametrize("time_conditioning", ("none", "sinusoidal"))
@pytest.mark.parametrize("bos, cache", list(itertools.product((0, 1), ("auto", "none"))))
def test_sampling_of_blocks_gives_the_logits_of_training(bos, cache, time_conditioning):
    """Whatever was written, cached sampling saw the distribution that training has for [corrupted ;
    clean]."""
    # noise levels are float32
    model, n, size = (network(time_conditioning=time_conditioning).float(), 4, 12 + bos)
    canvas = torch.full((3, size), 5)
    canvas[:, :bos] = 1
    canvas[1, bos : bos + 6] = torch.tensor([0, 1, 2, 3, 4, 0])  # a prompt that ends within a block
    steps = [
        (step.ids.clone(), step.fresh.clone(), step.top[1].clone(), step.nfe)
        for step in sample(
            model, canvas, sampler="first_hitting", block_len=n, rows=ROWS[bos], cache=cache, top=5
        )
    ]
    final, before = steps[-1][0], canvas
    for ids, fresh, top, _ in steps:
        p = doubled(model, before, final, n, bos).softmax(-1)
        torch.testing.assert_close(
            top[fresh], p[fresh].sort(-1, descending=True).values, atol=1e-5, rtol=1e-4
        )
        before = ids
    assert steps[-1][3] == 12 and not (final == 5).any()


@pytest.mark.parametrize(
    "sampler",
    ("confidence", "first_hitting", "ancestral", "remask", "remdm_cap:0.3", "entropy_bounded:0.5"),
)
def test_any_rule_writes_inside_blocks(sampler):
    """Blocks from left to right, given tokens stay, no MASK is left; a row alone is the row of a
    batch. (Each row is given something in its first block: where all is masked, all positions look
    the same to a network, and the last digit, which depends on the batch and on the machine,
    decides whose turn it is.)"""
    model, canvas = network(), torch.full((3, 12), 5)
    canvas[0, :5], canvas[1, 3], canvas[2, 2] = 1, 2, 3
    own = blocks.block_ids(12, 4, 0, canvas.device)
    for step in sample(model, canvas, sampler=sampler, block_len=4, steps=9, seeds=[3, 4, 5]):
        for row in range(3):
            open_, begun = own[step.masked[row]], own[(canvas[row] == 5) & ~step.masked[row]]
            assert not len(open_) or not len(begun) or begun.max() <= open_.min()
    assert not step.masked.any() and (step.ids[canvas != 5] == canvas[canvas != 5]).all()
    for row in range(3):
        *_, alone = sample(
            model, canvas[row : row + 1], sampler=sampler, block_len=4, steps=9, seeds=[3 + row]
        )
        assert torch.equal(alone.ids[0], step.ids[row])


@pytest.mark.parametrize("n", (1, 2))
def test_blocks_write_the_data(n):
    """Item 6: the exact conditionals, one token at a time in blocks."""
    canvas = torch.full((40_000, L), MASK)
    *_, last = sample(Blocks(n), canvas, sampler="first_hitting", block_len=n, cache="none")
    assert total_variation(empirical(last.ids), P) < 0.0225


@pytest.mark.parametrize("options", ({"objective": "ar"}, {"block_len": 4}))
@pytest.mark.parametrize("bos", (0, 1))
def test_texts_of_any_length(options, bos):
    """Beyond the window, keeping what is finished changes nothing, and the network sees windows as
    in training."""
    model, seen = network(), []
    canvas = torch.full((2, 45), 5)
    canvas[:, :3], canvas[1, 20:23] = torch.tensor([1, 2, 3]), 4
    window = 16 + bos
    rows = {}
    for cache in ("auto", "none"):
        handle = model.embedding.register_forward_pre_hook(
            lambda module, args: seen.append(args[0].shape)
        )
        *_, last = sample(
            model,
            canvas,
            window=window,
            cache=cache,
            rows=ROWS[bos],
            sampler="confidence",
            **options,
        )
        handle.remove()
        rows[cache] = last.ids.clone()
    assert torch.equal(rows["auto"], rows["none"]) and not (rows["auto"] == 5).any()
    assert all(width <= window for _, width in seen)
    computed = [width for _, width in seen[: len(seen) // 2]]
    assert sorted(computed)[len(computed) // 2] <= 4, "most calls compute a block"


def test_ar_samples_follow_the_model():
    """Item 6 for the exact conditionals; with a cache and without, the same tokens."""
    canvas = torch.full((40_000, L), MASK)
    *_, last = sample(Causal(), canvas, objective="ar", cache="none")
    assert total_variation(empirical(last.ids), P) < 0.0225 and last.nfe == L
    model, canvas = network(), torch.full((4, 20), 5)
    canvas[1, :4], canvas[2, 7] = 2, 3
    results = [
        list(sample(model, canvas, objective="ar", cache=cache, top=5))[-1]
        for cache in ("auto", "none")
    ]
    assert torch.equal(results[0].ids, results[1].ids)
    torch.testing.assert_close(results[0].top[1], results[1].top[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    (
        ({"objective": "ar", "guidance": 1.0}, "guidance=1.0 with an autoregressive model"),
        (
            {"block_len": 2, "cache": "dual", "decode_block": 2},
            "cache=dual with a model of blocks of 2",
        ),
        ({"block_len": 2, "decode_block": 3}, "decode_block=3 with a model of blocks of 2"),
        ({"objective": "uniform", "window": 3}, "no more than its window"),
        ({"correctors": 1}, "correctors=1 with a masked model.*only"),
    ),
)
def test_what_a_family_cannot_do(options, message):
    with pytest.raises(UserError, match=message):
        list(sample(Blocks(2), CANVASES[-1:].clone(), **options))


# --- gradients, importance sampling ---------------------------------------------------------------


def gradient(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("n", (0, 1, 2))
def test_gradients_of_the_training_loss_are_those_of_the_exact_bound(n):
    """The mean over many drawn corruptions against all masks enumerated, on the toy's data."""
    model = network(vocab_size=4, n_layer=1)
    for p in model.parameters():
        p.data.div_(6)
    x0 = SEQUENCES[[0, ROW, 50, 77]]
    if n:
        exact = exact_block_nelbo(model, x0, n).mean() / L
    else:
        exact = sum(
            MASKED.weighted_ce(
                model,
                x0,
                diffusion.Corruption(
                    s.expand(4, L),
                    torch.full(
                        (4,), 1 / int(s.sum()) / math.comb(L, int(s.sum())), dtype=torch.float64
                    ),
                ),
            ).mean()
            for s in SUBSETS
        )
    exact = gradient(model, exact)
    cfg = settings(block_len=n, seq_len=L)
    R = 1000 if n == 1 else 12_000
    drawn = family_of(cfg).corrupt((R, L), generator(6))
    drawn = drawn._replace(weight=drawn.weight.double())
    # strata are fixed to rows
    rows = x0.repeat(R // 4, 1)[torch.randperm(R, generator=generator(7))]
    many = gradient(model, family_of(cfg).loss(model, rows, drawn).mean())
    assert (many - exact).norm() < 0.06 * exact.norm()
    flat = gradient(
        model,
        family_of(cfg)
        .loss(model, rows, drawn._replace(weight=torch.ones_like(drawn.weight)))
        .mean(),
    )
    assert n == 1 or (flat - exact).norm() > 0.1 * exact.norm(), (
        "another weighting has other gradients"
    )


def test_gradients_under_uniform_noise_and_of_ar():
    """The training loss's own draws against the exact integral; and the autoregressive loss against
    a plain loop."""
    model = network(vocab_size=4, n_layer=1, time_conditioning="sinusoidal").float()
    for p in model.parameters():
        p.data.div_(6)
    chosen = [0, ROW, 50, 77]
    cfg = settings(objective="uniform", **family_defaults("uniform"))
    exact = gradient(model, exact_uniform_nelbo(model, 8, chosen).mean().float() / L)
    rows = SEQUENCES[chosen].repeat(15_000, 1)[torch.randperm(60_000, generator=generator(7))]
    drawn = family_of(cfg).corrupt((60_000, L), generator(6))
    many = gradient(model, family_of(cfg).loss(model, rows, drawn).mean())
    assert (many - exact).norm() < 0.15 * exact.norm()
    cfg, plain = settings(objective="ar"), network(vocab_size=4, n_layer=1)
    x0 = SEQUENCES[chosen]
    loss = family_of(cfg).loss(plain, x0, family_of(cfg).corrupt((4, L), None)).mean()
    loop = (
        sum(
            -plain(torch.cat((torch.full((4, 1), MASK), x0[:, :i]), 1), attention="causal")[
                :, -1
            ].log_softmax(-1)[torch.arange(4), x0[:, i]]
            for i in range(L)
        ).mean()
        / L
    )
    torch.testing.assert_close(gradient(plain, loss), gradient(plain, loop), atol=1e-9, rtol=1e-6)


def test_draws_of_a_density():
    density = torch.tensor([0.5, 2.0, 0.5, 1.0], dtype=torch.float64)
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    t = importance.inverse_cdf(u, density)
    torch.testing.assert_close(torch.histc(t, 4, 0, 1) / 25_000, density, atol=1e-3, rtol=0)
    torch.testing.assert_close(importance.cdf(t, density), u, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        importance.density_at(torch.tensor([0.1, 0.3, 0.99]), density), density[[0, 1, 3]]
    )


@pytest.mark.parametrize(
    "corruption, schedule", (("count", "linear"), ("count", "cos"), ("bernoulli", "poly2"))
)
def test_importance_sampling_keeps_the_bound(corruption, schedule):
    """Other times, the same mean: of the bound, and of the flat loss."""
    density = torch.tensor([0.5, 0.6, 0.9, 2.0], dtype=torch.float64)
    x0, model = SEQUENCES[[ROW]].expand(4000, L), Lookup(0.2)
    for weighting in ("elbo", "flat"):
        cfg = settings(corruption=corruption, schedule=schedule, loss_weighting=weighting)
        loss = lambda d, i: (
            family_of(cfg)
            .loss(model, x0, family_of(cfg).corrupt((4000, L), generator(i), d))
            .mean()
        )
        plain, reweighted = (
            torch.stack([loss(d, i) for i in range(8)]) * L for d in (None, density)
        )
        assert (
            abs((plain.mean() - reweighted.mean()).item())
            < 5 * (plain.var() / 8 + reweighted.var() / 8).sqrt().item() + 2e-3
        )
    drawn = [
        family_of(cfg).corrupt((4000, L), generator(1), d).masked.float().mean().item()
        for d in (None, density)
    ]
    assert drawn[1] > drawn[0] + 0.05, "more rows with many masks"


def test_the_density_of_times_follows_the_spread_of_the_losses():
    """A network that is sure of everything but rows without context has its loss there."""

    class Blind:
        vocab_size = 11

        def __call__(self, ids, noise_level=None, select=None):
            logits = torch.zeros(len(select), 10)
            level = (ids == 10).float().mean(1)[select // ids.size(1)]
            logits[:, 0] = torch.where(level > 0.75, 0.0, 9.0)
            return logits

    density = importance.time_density(MASKED, Blind(), torch.zeros(256, 32, dtype=torch.long))
    assert density.mean().item() == pytest.approx(1) and density.min() >= 0.5
    assert density[12:].min() > 1.5 and density[:12].max() < 0.6


# --- given tokens, a row each ---------------------------------------------------------------------


def prefixes(rows):
    """(which tokens of the rows of L are given, (rows, L) bool: the first 0, 1 or 2, or all; how
    many, (rows,))"""
    cut = torch.tensor([0, 1, 2, L])[torch.arange(rows) % 4][
        torch.randperm(rows, generator=generator("cut"))
    ]
    return torch.arange(L) < cut[:, None], cut


@pytest.mark.parametrize(
    "changes, model",
    (
        ({}, Lookup()),
        ({"schedule": "cos"}, Lookup()),
        ({"corruption": "bernoulli"}, Lookup()),
        ({"block_len": 2, "seq_len": L}, Blocks(2)),
        ({"block_len": 1, "seq_len": L}, Blocks(1)),
        ({"objective": "ar"}, Causal()),
    ),
)
def test_given_tokens_are_never_noised_and_cost_nothing(changes, model):
    """Loss and bound are -log p of the rest given them, in the mean over masks, with the perfect
    network; whatever other rows are given."""
    kind, R = family(**changes), 8000
    given, cut = prefixes(R)
    x0 = SEQUENCES[[ROW]].expand(R, L)
    drawn = kind.corrupt((R, L), generator(3), given=given)
    assert not (drawn.masked & given).any()
    loss = kind.loss(model, x0, drawn).double() * L
    bound = kind.nelbo(model, x0, given=given)[:, 0].double() * L
    for count in (0, 1, 2, L):
        begins = (SEQUENCES[:, :count] == SEQUENCES[ROW, :count]).all(1)
        exact = (P[begins].sum() / P[ROW]).log().item()
        for found in (loss[cut == count], bound[cut == count]):
            assert (
                abs(found.mean().item() - exact)
                < 5 * found.std().item() / math.sqrt(len(found)) + 1e-5
            )


def test_given_tokens_under_uniform_noise():
    kind = family(objective="uniform", corruption="bernoulli", schedule="poly2")
    given, _ = prefixes(400)
    drawn = kind.corrupt((400, L), generator(3), given=given)
    free = kind.corrupt((400, L), generator(3))
    assert torch.equal(drawn.masked, free.masked & ~given)
    model = network(time_conditioning="sinusoidal").float()
    x0 = torch.randint(5, (400, L), generator=generator(4))
    loss = kind.loss(model, x0, drawn)
    assert (loss[given.all(1)] == 0).all() and (loss[~given.all(1)] > 0).all()
    assert (kind.nelbo(model, x0, 2, given)[given.all(1)] == 0).all()


@pytest.mark.parametrize(
    "changes, options",
    (
        ({}, {}),
        ({}, {"decode_block": 4, "window": 12}),
        ({}, {"decode_block": 4, "cache": "dual", "window": 12}),
        ({"block_len": 4}, {"window": 12}),
        ({"objective": "ar"}, {"window": 12}),
        ({"objective": "uniform"}, {}),
    ),
)
def test_no_text_ends_before_its_least_length(changes, options):
    """Wherever its first token is generated, whatever the window; the tokens behind are free."""
    if changes.get("objective") == "uniform":
        changes = family_defaults("uniform") | changes
    canvas = torch.full((8, 20), 5)
    canvas[:, 0], canvas[4:, :4] = 1, torch.tensor([1, 2, 3, 4])

    def generated(min_len):
        model = toy.network(6, 5, seq_len=20, **changes)
        *_, last = sample(model, canvas, seq_len=20, stop=0, min_len=min_len, **changes, **options)
        return [row[mask] for row, mask in zip(last.ids, canvas == 5)]

    assert any(0 in row[:10] for row in generated(0))
    ids = generated(10)
    assert not any(0 in row[:10] for row in ids) and any(0 in row[10:] for row in ids)
