import dataclasses
import math

import pytest
import torch
from toy import MASKED, family, sample, settings

import diffusion
from model import Transformer, rotary_table
from utils import attention, blocks, runtime
from utils.attention import ShortAttention
from utils.optim import Muon, lr_scale, make_optimizers


def shape(**changes):
    return settings(
        **{"n_layer": 2, "n_head": 2, "n_embd": 32, "init": "normal", "tie_embeddings": False}
        | changes
    )


def build(vocab_size=12, **changes):
    torch.manual_seed(0)
    model = Transformer(shape(**changes), vocab_size).eval()
    # as if trained: zero-initialised projections would hide what a test looks for
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.proj.weight, std=0.2)
        torch.nn.init.normal_(block.mlp.proj.weight, std=0.2)
        if block.modulation is not None:
            torch.nn.init.normal_(block.modulation.weight, std=0.2)
    return model


IDS = torch.tensor([[0, 11, 3, 11, 5, 11, 11, 2], [11] * 8])
KINDS = (
    {},
    {"time_conditioning": "table", "diffusion_steps": 10},
    {"time_conditioning": "sinusoidal"},
    {"time_conditioning": "adaln"},
)


@pytest.mark.parametrize("vocab_size, count", ((66, 10_706_304), (2048, 12_228_480)))
def test_parameter_counts_of_the_micro_dllms(vocab_size, count):
    cfg = shape(n_layer=6, n_head=6, n_embd=384, time_conditioning="table", diffusion_steps=100)
    with torch.device("meta"):
        assert Transformer(cfg, vocab_size).num_parameters() == count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", (False, True))
def test_logits_have_no_mask_column(kind, tied):
    model = build(tie_embeddings=tied, **kind)
    logits = model(IDS, torch.tensor([0.5, 1.0]))
    assert logits.shape == (2, 8, 11) and logits.isfinite().all()
    assert (model.head.weight is model.embedding.weight) == tied


@pytest.mark.parametrize("kind", KINDS)
def test_select_gives_the_same_logits(kind):
    model, level, index = build(**kind), torch.tensor([0.5, 1.0]), torch.tensor([1, 3, 9, 15])
    torch.testing.assert_close(
        model(IDS, level, select=index), model(IDS, level).flatten(0, 1)[index]
    )


def test_first_loss_is_ln_v():
    """Zero initialisation: exactly; N(0, 0.02), tied or not: nearly. (A tied head cannot start at
    zero.)"""
    for changes, tolerance in (
        ({"init": "zero"}, 1e-6),
        ({"init": "normal"}, 0.05),
        ({"init": "normal", "tie_embeddings": True}, 0.05),
    ):
        torch.manual_seed(0)
        model = Transformer(shape(**changes), 66)
        x0 = torch.randint(65, (16, 32))
        assert MASKED.nelbo(model, x0).mean().item() == pytest.approx(math.log(65), rel=tolerance)


def test_time_conditioning_is_needed_and_used():
    for kind in KINDS[1:]:
        model = build(**kind)
        with pytest.raises(ValueError, match="needs noise_level"):
            model(IDS)
        a, b = model(IDS, torch.tensor([0.2, 0.2])), model(IDS, torch.tensor([0.9, 0.9]))
        assert not torch.allclose(a, b)
        one_per_position = model(IDS, torch.tensor([[0.2] * 8, [0.9] * 8]))
        torch.testing.assert_close(one_per_position[0], a[0])
        torch.testing.assert_close(one_per_position[1], b[1])
    assert torch.equal(build()(IDS), build()(IDS, torch.tensor([0.9, 0.9])))


def test_row_zero_of_the_time_table_is_for_clean_text_only():
    """The sampler must never read a row that training does not reach."""
    noise = build(time_conditioning="table", diffusion_steps=10).noise
    rows = lambda m: noise(torch.tensor(m)) @ noise.table.weight.T
    assert rows([0.0, 0.001, 0.04, 0.26, 1.0]).argmax(1).tolist() == [0, 1, 1, 3, 10]


def test_who_may_look_at_whom():
    """A causal mask hides the future exactly; a bool mask hides what it says; full attention hides
    nothing."""
    model, changed = build(), IDS.clone()
    changed[0, 5] = 7
    before, after = model(IDS), model(changed)
    assert not torch.allclose(before[0, 0], after[0, 0])
    before, after = (model(ids, attention="causal") for ids in (IDS, changed))
    assert torch.equal(before[0, :5], after[0, :5]) and not torch.allclose(
        before[0, 6:], after[0, 6:]
    )
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    torch.testing.assert_close(model(IDS, attention=causal), before)


@pytest.mark.parametrize("masked", (False, True))
def test_short_attention_is_attention(masked):
    """The attention for training in bfloat16 on a CPU: values and gradients are PyTorch's."""
    torch.manual_seed(0)
    q, k, v, dy = (torch.nn.functional.rms_norm(torch.randn(2, 3, 8, 16), (16,)) for _ in range(4))
    mask = torch.ones(8, 8, dtype=torch.bool).tril() if masked else None
    results = []
    for attend in (torch.nn.functional.scaled_dot_product_attention, ShortAttention.apply):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attend(*inputs, mask)
        results.append((y, *torch.autograd.grad(y, inputs, dy)))
    torch.testing.assert_close(results[0], results[1], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("size", (3, 6, 20, 64))
def test_attention_in_tiles_is_attention(size):
    """Values and gradients are those of the whole mask; what nobody looks at is left out."""
    torch.manual_seed(0)
    mask = blocks.doubled_mask(10, 3, 1, torch.device("cpu"))
    tiled = attention.tiles(mask, size)
    q, k, v, dy = (torch.randn(2, 3, 20, 16) for _ in range(4))
    results = []
    for looks in (mask, tiled):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attention.attend(*inputs, looks)
        results.append((y, *torch.autograd.grad(y, inputs, dy)))
    torch.testing.assert_close(results[0], results[1], atol=2e-6, rtol=1e-5)
    scores = sum(tile.mask.numel() for tile in tiled)
    assert sum(tile.mask.sum() for tile in tiled) == mask.sum()
    assert scores < 400 if size < 20 else scores == 400


def test_hidden_tokens_do_not_leak():
    """Changing x0 where it is masked changes neither the logits nor which positions are scored."""
    model, masked = build(), torch.tensor([[False, True, True, False, True, False, False, True]])
    x0, other = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), torch.tensor([[1, 9, 9, 4, 9, 6, 7, 9]])
    a, b = (model(diffusion.q_sample(x, masked, 11)) for x in (x0, other))
    assert torch.equal(a, b)


def test_positions_are_relative():
    model = build()
    torch.testing.assert_close(
        model(IDS, positions=torch.arange(8) + 100), model(IDS), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(model(IDS, positions=torch.arange(8) * 3), model(IDS))


def test_dropout_only_in_training():
    model = build(dropout=0.5)
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))


@pytest.mark.parametrize("size", ((64, 64), (128, 32), (32, 128)))
def test_muon_is_torchs(size):
    torch.manual_seed(0)
    start = torch.randn(size)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = (
        Muon([ours], 0.02, weight_decay=0.1),
        torch.optim.Muon([theirs], 0.02, weight_decay=0.1, momentum=0.9),
    )
    for _ in range(5):
        ours.grad = torch.randn(size)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm(), "torch's runs in bfloat16"


def test_muon_steps_are_nearly_orthogonal():
    w = torch.nn.Parameter(torch.zeros(48, 16))
    w.grad = torch.randn(48, 16, generator=runtime.generator(1))
    Muon([w], lr=1.0).step()
    values = torch.linalg.svdvals(w.detach()) / math.sqrt(3)
    assert values.min() > 0.6 and values.max() < 1.3


def test_optimizers_share_the_parameters():
    model = build(tie_embeddings=True, time_conditioning="adaln")
    for kind, muon in (("muon", 2 * (6 + 1)), ("adamw", 0)):
        cfg = settings(optimizer=kind, lr=1e-3, muon_lr=0.02, weight_decay=0.1)
        groups = [g for o in make_optimizers(model, cfg) for g in o.param_groups]
        everything = [id(p) for g in groups for p in g["params"]]
        assert sorted(everything) == sorted(id(p) for p in model.parameters())
        assert sum(len(g["params"]) for g in groups if g["peak"] == 0.02) == muon
        assert all(p.ndim == 2 for g in groups if g["weight_decay"] for p in g["params"])


def test_learning_rate():
    cfg = settings(warmup_iters=10, lr_decay="linear", decay_share=0.5)
    assert lr_scale(cfg, 0, 0) == pytest.approx(0.1) and lr_scale(cfg, 9, 0.01) == 1
    assert [lr_scale(cfg, 99, p) for p in (0.5, 0.75, 1.0, 1.2)] == [1, 0.5, 0, 0]
    cfg = dataclasses.replace(cfg, lr_decay="cosine")
    assert [round(lr_scale(cfg, 99, p), 6) for p in (0.5, 0.75, 1.0)] == [1, 0.5, 0]
    cfg = dataclasses.replace(cfg, lr_decay="constant")
    assert lr_scale(cfg, 99, 1.0) == 1
    cfg = dataclasses.replace(cfg, warmup_iters=0)
    assert lr_scale(cfg, 0, 0) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_overfits_one_sequence(kind):
    """With a given first token, as in document rows: rotary positions are relative, so a row of
    nothing but MASKs looks the same everywhere, and no network of this kind can know where it is in
    it."""
    torch.manual_seed(0)
    model = Transformer(shape(init="zero", **kind), 12).train()
    x0 = torch.randint(11, (1, 8), generator=runtime.generator(2)).expand(32, 8)
    documents = family(rows="document")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, 2 - step / 100)
        documents.loss(
            model, x0, documents.corrupt((32, 8), runtime.generator(step))
        ).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert documents.nelbo(model, x0).mean() < 0.01
    canvas = torch.full((2, 8), 11)
    canvas[:, 0] = x0[:2, 0]
    *_, last = sample(model, canvas)
    assert torch.equal(last.ids, x0[:2])


def test_learns_the_toy_chain():
    """Two layers on samples of the toy reach E[NELBO] - H < 0.02 nats, judged on all 81 sequences
    with their weights."""
    from test_maths import ENTROPY, exact_nelbo
    from toy import SEQUENCES, P

    torch.manual_seed(0)
    model = Transformer(shape(init="zero"), 4).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.99))
    steps = 500
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, 2 * (1 - step / steps))
        x0 = SEQUENCES[
            torch.multinomial(P, 256, replacement=True, generator=runtime.generator("x", step))
        ]
        MASKED.loss(model, x0, MASKED.corrupt((256, 4), runtime.generator(step))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        excess = (P * exact_nelbo(model.eval(), SEQUENCES)).sum().item() - ENTROPY
    assert -1e-6 < excess < 0.02


def test_rotary_base_is_the_longest_wavelength():
    """A pair of channels turns by one radian a token, the slowest by 1 / base (but for half a
    step); 10,000 as published."""
    for base in (100.0, 10_000.0):
        cos, sin = rotary_table(torch.tensor([1]), 64, base)
        angle = torch.atan2(sin[0, 0, :32], cos[0, 0, :32])
        assert angle[0].item() == pytest.approx(1) and angle[-1].item() == pytest.approx(
            base ** (-62 / 64), rel=1e-4
        )
    far, near = (Transformer(shape(rope_base=base), 12) for base in (10_000.0, 10.0))
    near.load_state_dict(far.state_dict())
    torch.nn.init.normal_(far.head.weight)
    near.head.weight.data.copy_(far.head.weight)
    x = torch.arange(8)[None]
    assert not torch.allclose(far(x), near(x)), "the setting reaches the network"
