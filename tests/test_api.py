"""The Python interface: `load`, and a model that generates, streams and judges."""

import dataclasses
import html
import json
import math

import pytest
import torch
import toy
from conftest import TINY, load, run

import diffusion
import inference
import train
from utils import canvas, checkpoint, encoding, repair, trace
from utils.cli import UserError
from utils.families import family_of

SMALL = [*TINY, "--rows", "stream", "--seq_len", "24"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny runs on tales: of documents, of blocks, autoregressive."""
    folder = tmp_path_factory.mktemp("runs")
    for name, words in (
        ("documents", TINY),
        ("blocks", [*SMALL, "--block_len", "4"]),
        ("ar", [*SMALL, "--objective", "ar"]),
        ("uniform", [*SMALL, "--objective", "uniform", "--time_conditioning", "sinusoidal"]),
    ):
        train.train(
            load(["tales", *words, "--name", name, "--out_dir", str(folder)])[0], quiet=True
        )
    return folder / "models"


def model_of(folder, name):
    return inference.load(str(folder / f"{name}.best.pt"), device="cpu")


@pytest.mark.parametrize("name", ("documents", "blocks", "ar", "uniform"))
def test_python_and_the_command_line_write_the_same(name, folder, monkeypatch, capsys):
    """Options by their names; several texts are a list; the record is that of --json."""
    model = model_of(folder, name)
    words = [
        "--checkpoint",
        str(folder / f"{name}.best.pt"),
        "--device",
        "cpu",
        "--prompt",
        "One day",
    ]
    words += "--num-samples 2 --seed 5 --temperature 0.8 --json".split()
    code, out, _ = run(inference.main, words, monkeypatch, capsys)
    lines = list(map(json.loads, out.splitlines()))
    samples = model.generate("One day", num_samples=2, seed=5, temperature=0.8)
    timed = ("seconds", "tokens_per_second")
    for line, sample in zip(lines, samples, strict=True):
        record = sample.record()
        assert line.keys() == record.keys()
        assert all(line[key] == record[key] for key in line if key not in timed)
    assert code == 0 and str(samples[0]) == samples[0].text == lines[0]["text"]
    alone = model.generate("One day", seed=6, temperature=0.8)
    assert alone.text == samples[1].text, "a row gets the same text whatever its batch"


@pytest.mark.parametrize("name", ("documents", "blocks", "ar"))
def test_stream_shows_every_state(name, folder):
    """From the canvas to the text of `generate`; what is given is there from the first, and the
    masks get fewer."""
    model = model_of(folder, name)
    states, sample = list(model.stream("One day", seed=3)), model.generate("One day", seed=3)
    left = [state.tokens.count(None) for state in states]
    assert left == sorted(left, reverse=True) and left[0] > left[-1] == 0
    assert states[0].number == 0 and not any(states[0].fresh)
    assert all(state.text.startswith("One day") for state in states)
    assert trace.MASKED in states[0].text and states[-1].text == sample.text
    assert states[-1].nfe == sample.nfe and len(sample.trace.frames) == len(states)


def test_stream_of_uniform_noise(folder):
    """No masks, a noise level that falls, as many NFE as `generate` needs."""
    model, how = model_of(folder, "uniform"), dict(seed=3, steps=12)
    states, sample = list(model.stream("One day", **how)), model.generate("One day", **how)
    noise = [state.noise for state in states]
    assert noise == sorted(noise, reverse=True) and noise[0] == 1 and noise[-1] == 0
    assert len(states) == 13 and None not in states[1].tokens
    assert states[-1].text == sample.text and states[-1].nfe == sample.nfe == 12
    assert sample.trace.frames[-1].nfe == 12


DRAFT = "One day, Tom saw a cat."


@pytest.mark.parametrize("name", ("documents", "uniform"))
def test_a_draft_is_what_stands_there_at_first(name, folder, monkeypatch):
    """Its trace begins with it; where most is taken to be wrong, much of it is changed."""
    model = model_of(folder, name)
    sample = model.generate(draft=DRAFT, seed=1, steps=6, draft_noise=0.95)
    first, *rest = sample.trace.frames
    blank = [model.tokenizer.end] + [model.tokenizer.mask] * (len(first.ids) - 1)
    assert trace.shown(first, blank, model.tokenizer).text == DRAFT and rest
    asked = len(first.ids) - 1 if name == "documents" else 0  # each token while it is masked
    assert len(sample.tokens) == len(first.ids) and asked < sample.nfe <= asked + 6
    assert first.nfe == 0 and rest[-1].nfe == sample.nfe
    assert rest[-1].masks == (name == "documents") and trace.given_in([first], model.tokenizer) == [
        False
    ] * len(first.ids)
    if name == "documents":  # what is doubted is masked in a step of its own
        begun = rest[0]
        assert begun.nfe == asked and begun.noisy == begun.remasked and any(begun.noisy)
        assert begun.noise == pytest.approx(sum(begun.noisy) / asked)
    assert [state.text for state in model.stream(draft=DRAFT)][0] == DRAFT
    monkeypatch.setattr(canvas, "MOST_TOKENS", 50)
    for options, message in (
        ({"draft": "One day, " * 60}, "the window has"),
        ({"draft": DRAFT, "prompt": "One"}, "leave out --prompt"),
        ({"draft": DRAFT, "min_len": 3}, "leave out .*--min-len"),
        ({"draft": DRAFT, "num_samples": 9}, "ask for fewer at a time"),
    ):
        with pytest.raises(UserError, match=message):
            model.generate(**options)


def test_what_is_doubted_in_a_draft():
    """Bayes, by enumeration: a share of the tokens is wrong, each as likely, in place of one that
    fits the others; at least one is doubted."""
    kind, everywhere = toy.family(), torch.ones(toy.L, dtype=torch.bool)
    for share in (0.05, 0.6):
        for x in (0, 17, 33, 80):
            text, found = toy.SEQUENCES[x], []
            for i in range(toy.L):
                alike = (toy.SEQUENCES == text).sum(1) + (toy.SEQUENCES[:, i] != text[i]) == toy.L
                p = toy.P[x] / toy.P[alike].sum()
                found.append((1 - share) * p < share / toy.V)
            doubted = repair.doubtful(kind, toy.Lookup(), text, everywhere, share)
            expected = torch.stack(found)
            assert doubted.equal(expected) or doubted.sum() == 1 and not expected.any()


def test_stream_leaves_the_caller_alone(folder):
    """What the caller computes between two states is not in the model's precision."""
    model = inference.load(str(folder / "documents.best.pt"), device="cpu", dtype="bfloat16")
    for _ in model.stream():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_a_notebook_shows_the_trace(folder):
    """In a frame of its own, so that several do not share names; a text that was not recorded, and
    what is no markup, as it stands."""
    sample = model_of(folder, "documents").generate("One day")
    shown = sample._repr_html_()
    assert shown.startswith("<iframe") and shown.count("<") == 2
    page = html.unescape(shown[shown.index('srcdoc="') + 8 : shown.index('" sandbox')])
    assert page.startswith("<!DOCTYPE html>") and '"steps":[' in page and "NFE" in page
    plain = dataclasses.replace(sample, text="a < b", trace=None)
    assert "a &lt; b" in plain._repr_html_()
    assert len(repr(sample)) < 1000, "of the trace, the tokens and their figures nothing"


def test_files_of_viewers_are_written(folder):
    model_of(folder, "documents").generate(viz_html="t.html", viz_gif="t.gif", steps=4)
    assert open("t.gif", "rb").read(6) == b"GIF89a" and "<html" in open("t.html").read()


def test_the_bound_of_a_text(folder):
    """Exact for an autoregressive model; of documents it is the bound of the row that training
    has; of blocks, what fills the last one up costs nothing."""
    text, ar = "One day, Tom saw a cat.", model_of(folder, "ar")
    row = encoding.token_stream([text], ar.tokenizer).long()[None]
    assert row.size(1) < 24
    with torch.no_grad(), ar.hardware.autocast():
        logits = ar.family.logits(ar.network, row)[0, 1:]
    found = ar.nll(text)
    assert math.isclose(found.nats, diffusion.token_nll(logits, row[0, 1:]).sum(), rel_tol=1e-4)
    assert found.tokens == row.size(1) - 1 and found.se_masks == 0 and math.isnan(found.se_rows)
    assert math.isclose(found.bits_per_byte, found.nats / math.log(2) / len(text.encode()))

    documents = model_of(folder, "documents")
    rows = encoding.document_rows([text], documents.tokenizer, 67)
    with documents.hardware.autocast():
        nll = documents.family.nelbo(documents.network, rows, 8) * 67
    found = documents.nll(text, passes=8)
    assert math.isclose(found.nats, nll.mean(), rel_tol=1e-5) and found.se_masks > 0
    assert found.tokens == 66


def test_windows_of_a_text_have_masks_of_their_own(folder):
    """So that their errors do not add up: more windows, relatively less error."""
    model, text = model_of(folder, "uniform"), "One day, Tom saw a cat by the sea. " * 12
    one, many = (model.nll(words, passes=16) for words in (text[:60], text))
    assert many.tokens > 5 * one.tokens
    assert many.se_masks / many.nats < 0.6 * one.se_masks / one.nats


def test_the_bound_of_a_model_that_pairs_its_masks(folder):
    model = model_of(folder, "documents")
    found = model.nll("One day", passes=8)
    model.family = family_of(dataclasses.replace(model.family.cfg, complementary=True))
    assert model.nll("One day", passes=8).nats == found.nats


@pytest.mark.parametrize("name", ("documents", "blocks", "ar"))
@pytest.mark.parametrize(
    "text", ("One day", "One day,", "One day, Tom", "One day, Tom saw a cat " * 4)
)
def test_each_token_of_a_text_counts_once(name, text, folder):
    """Of a network to which all tokens are alike: ln V each, and nothing for what is given or fills
    a last block up."""
    model = model_of(folder, name)
    model.network.head.weight.data.zero_()
    found = model.nll(text, passes=4)
    [ids], L = model.tokenizer.encode([text]), model.family.cfg.seq_len
    wanted = (L - 1) * -(-len(ids) // (L - 1)) if name == "documents" else len(ids) + 1
    assert found.tokens == wanted
    assert math.isclose(
        found.nats_per_token, math.log(model.tokenizer.vocab_size - 1), rel_tol=1e-5
    )
    assert math.isnan(found.se_rows) == (len(ids) + 2 <= L)


def test_mistakes(folder):
    """In one line, and before any work."""
    model = model_of(folder, "documents")
    for call, message in (
        (lambda: model.generate(stepz=3), "did you mean steps"),
        (lambda: model.generate(device="cuda"), "chosen when a model is loaded"),
        (lambda: model.generate(json=True), "for the command line"),
        (lambda: next(model.stream(viz_gif="t.gif")), "viz_gif is for generate"),
        (lambda: model.nll("One day", passes=0), "at least 1"),
        (lambda: model.nll(3), "takes a text"),
        (lambda: model.generate(temperature="warm"), "must be of type float"),
        (lambda: model.generate(sampler="best"), "there is no sampler best"),
        (lambda: model.generate("One day " * 100), "shorten it"),
        (lambda: next(model.stream(num_samples=2)), "stream shows one text"),
        (lambda: model.nll(""), "no text"),
        (lambda: inference.load("nowhere.pt"), "there is no checkpoint nowhere.pt"),
        (lambda: inference.load(device="cpu"), "train one with"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    state = checkpoint.read(str(folder / "documents.best.pt"))
    assert state["sample"]["temperature"] == model.settings().temperature
