"""Pairs of a question, which is given, and its answer: files, rows, loss and bound, stories on
request, and what a model of pairs writes."""

import itertools
import json
import math
import os
import statistics

import pytest
import torch
import toy
from conftest import TINY, load, run
from toy import MASK, SEQUENCES, A, Lookup, P

import inference
import train
from scripts import data, evaluate, export
from scripts.lab import ablate, compare_adapt, compare_padding, compare_requests, variants
from utils import corpus, families, metrics, pairs, ranks, requests, runs, runtime, tales
from utils import tokenizer as tokenizers
from utils.cli import UserError
from utils.corruption import Corruption
from utils.pairs import Pair, asked

CPU = ranks.Hardware(torch.device("cpu"), torch.float32)
TALK = (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "And now?"))


def write(rows, path="pairs.jsonl"):
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def messages(said):
    return [{"role": role, "content": text} for role, text in said]


def characters(texts):
    return tokenizers.with_roles(tokenizers.train_char(texts, documents=True))


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, found",
    (
        ({"prompt": "Hi", "completion": "Hello."}, [asked("Hi", "Hello.")]),
        (
            {"prompt": messages(TALK), "completion": messages([("assistant", "Bye.")])},
            [Pair(TALK, "Bye.")],
        ),
        (
            {"messages": messages([*TALK, ("assistant", "Bye.")])},
            [Pair(TALK[:2], "Hello."), Pair(TALK, "Bye.")],
        ),
    ),
)
def test_rows_of_data_sets_are_pairs(row, found):
    """In the format of TRL; every answer of a conversation makes one, with all before it."""
    assert pairs.read(write([row])) == found


@pytest.mark.parametrize(
    "row, why",
    (
        ({"text": "a"}, "it has the columns text; expected prompt and completion, or messages"),
        ({"messages": messages([("user", "Hi")])}, "nobody answers"),
        ({"messages": messages([("robot", "Hi")])}, "a message has the role robot; known: system"),
        ({"messages": [{"role": "user"}]}, "a message has a role and a content"),
        ({"messages": []}, "expected a text or a list of messages"),
        ({"prompt": "Hi", "completion": 3}, "expected a text or a list of messages, got int"),
        (
            {"prompt": messages(TALK), "completion": messages([("user", "Bye.")])},
            "its completion is not the assistant's",
        ),
    ),
)
def test_rows_that_are_no_pairs(row, why):
    with pytest.raises(UserError, match=f"row 1 of pairs.jsonl is no pair: {why}"):
        pairs.read(write([row]))


def test_what_cannot_be_trained_on(monkeypatch, capsys):
    words = [*TINY, "--data", "pairs.jsonl", "--rows", "pair", "--short_rows", "0"]
    start = lambda *more: run(train.main, [*words, *more], monkeypatch, capsys)
    for rows, more, why in (
        ([{"prompt": "Hi", "completion": ""}], (), "pairs.jsonl has no pairs"),
        ([{"prompt": "Hi", "completion": "Hello."}], (), "a single pair"),
        (
            [{"prompt": "Hi", "completion": "word " * n} for n in (50, 60)],
            ("--seq_len", "16"),
            "no held-out pair of pairs.jsonl fits into seq_len=16",
        ),
        (None, ("--short_rows", "0.1"), "short_rows=0.1"),
        (None, ("--loss_weighting", "pooled"), "need uniform times, elbo, flat or clip"),
        (None, ("--data", "tales"), "it has no pairs"),
        (None, ("--data", "tales_asked", "--rows", "document"), "it is of pairs"),
    ):
        write(rows or [{"prompt": f"{n}", "completion": "Yes."} for n in range(9)])
        code, _, err = start(*more)
        assert code == 2 and why in err and "Traceback" not in err, err


def test_pairs_of_a_data_set_are_written(monkeypatch, capsys):
    """As messages, each answer with all before it; shuffled, and no more than were asked for."""
    write([{"messages": messages([*TALK, ("assistant", f"Bye {n}.")])} for n in range(5)])
    words = "--dataset pairs.jsonl --num-stories 7 --output out/some.jsonl"
    code, out, err = run(data.main, words, monkeypatch, capsys)
    assert code == 0 and "wrote 7 pairs" in out, err
    found = pairs.read("out/some.jsonl")
    every = pairs.read("pairs.jsonl")
    assert len(every) == 10 and len(found) == 7 and all(pair in every for pair in found)
    assert found != every[:7]
    write([{"text": "a"}])
    code, _, err = run(data.main, words, monkeypatch, capsys)
    assert code == 2 and "row 1 of pairs.jsonl is no pair" in err
    assert pairs.read("out/some.jsonl") == found


# --- rows -----------------------------------------------------------------------------------------


def test_rows_and_back():
    """What is given ends with the marker of the answer, the last one; its length counts its end. A
    text that spells a marker is text."""
    found = [asked("ab", "ba"), Pair(TALK, "b"), asked("", "<|assistant|>"), asked("a" * 99, "b")]
    tokenizer = characters(pairs.texts_of(found))
    rows, left_out = pairs.rows_of(found, tokenizer, 64)
    assert rows.shape == (3, 64) and left_out == 1
    a, b = tokenizer.encode(["a", "b"])
    end, user, assistant = tokenizer.end, tokenizer.roles["user"], tokenizer.roles["assistant"]
    assert rows[0, :8].tolist() == [end, user, *a, *b, assistant, *b, *a, end]
    assert pairs.given(rows, tokenizer).sum(1)[[0, 2]].tolist() == [5, 3]
    assert pairs.answer_lengths(rows, tokenizer).tolist() == [3, 2, 14]
    assert pairs.of_rows(rows, tokenizer) == found[:3]
    assert tokenizer.pieces(rows[0].tolist())[:8] == ["", "", "a", "b", "\n", "b", "a", ""]
    assert tokenizer.decode(rows[0].tolist()) == "abba"


def test_a_tokenizer_gets_the_markers_that_it_lacks():
    for plain in (
        tokenizers.train_char(["abc"], documents=True),
        tokenizers.train_bpe(["a story of a cat"] * 3, 300),
    ):
        larger = tokenizers.with_roles(plain)
        assert list(larger.roles.values()) == [plain.mask, plain.mask + 1, plain.mask + 2]
        assert larger.mask == plain.mask + 3 and tokenizers.with_roles(larger) is larger
        again = tokenizers.from_json(larger.to_json())
        assert again.roles == larger.roles and again.end == plain.end
        assert larger.encode(["abc"]) == plain.encode(["abc"])
    assert plain.decode(larger.encode(["<|user|>"])[0]) == "<|user|>"
    without = tokenizers.train_char(["abc"], documents=False)  # of a single document
    larger = tokenizers.with_roles(without)
    assert larger.end == without.mask and larger.mask == without.mask + 4
    assert pairs.rows_of([asked("a", "b")], larger, 8)[0].shape == (1, 8)


def test_a_checkpoint_of_pairs_without_markers_is_refused(monkeypatch, capsys):
    words = ["tales_asked", *TINY, "--final_samples", "0"]
    assert run(train.main, words, monkeypatch, capsys)[0] == 0
    state = runs.checkpoint.read("artifacts/models/tales_asked.best.pt")
    state["tokenizer"] = tokenizers.train_bpe(["a story"] * 3, 300).to_json()
    runs.checkpoint.save("artifacts/models/tales_asked.best.pt", state)
    code, _, err = run(inference.main, ["--prompt", "A story."], monkeypatch, capsys)
    assert code == 2 and "has no markers of roles" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"corruption": "bernoulli"},
        {"block_len": 4},
        {"objective": "ar"},
        {"objective": "uniform"},
    ),
)
def test_questions_are_never_noised(changes):
    """In no family; and two processes have the halves of one batch, whose loss is stated per token
    of its answers."""
    words = [f"--{name}={value}" for name, value in changes.items()]
    cfg, _ = load(["tales_asked", *TINY, "--batch_size", "8", *words])
    text, family = corpus.load(cfg), families.family_of(cfg)
    [(x0, drawn)], _, rows = train.draw_batch(family, text, 3, CPU)
    given = pairs.given(x0, text.tokenizer)
    assert given.sum(1).min() >= 4 and not (drawn.masked & given).any() and drawn.masked.any()
    assert rows == pairs.answer_lengths(x0, text.tokenizer).sum() / cfg.seq_len
    halves = [train.draw_batch(family, text, 3, CPU._replace(rank=r, world=2)) for r in (0, 1)]
    assert all(half.rows == rows for half in halves)
    for part in (lambda piece: piece[0], lambda piece: piece[1].masked):
        assert torch.equal(part((x0, drawn)), torch.cat([part(half.pieces[0]) for half in halves]))


class Answers:
    """Of the toy: a network that has the first two of its four letters as a question and knows all
    of the rest; and that an answer has two letters."""

    def __init__(self, tokenizer, causal):
        self.vocab_size, self.lookup = tokenizer.vocab_size, Lookup()
        self.tokenizer, self.causal = tokenizer, causal

    def __call__(self, ids, noise_level=None, select=None, attention=None):
        if self.causal:  # reads the row one to the right, and knows what is before a position
            ids = torch.cat((ids[:, 1:], ids[:, -1:]), 1)
        letters = ids[:, [2, 3, 5, 6]]
        letters = torch.where(letters < 3, letters, MASK)
        out = torch.full((*ids.shape, self.vocab_size - 1), -1e4)
        out[..., self.tokenizer.end] = 0.0
        for place, of in ((5, 2), (6, 3)):
            seen = letters.clone()
            if self.causal:
                seen[:, of:] = MASK
            out[:, place] = -1e4
            out[:, place, :3] = self.lookup(seen)[:, of].float()
        return out if select is None else out.flatten(0, 1)[select]


@pytest.mark.parametrize("objective", ("masked", "ar"))
def test_the_bound_is_of_the_answer_given_the_question(objective):
    """Exactly p(x3, x4 | x1, x2) of the toy with the perfect network, in nats per token of the
    answer with its end; through rows, masks and metrics as they are."""
    letters = lambda ids: "".join("abc"[i] for i in ids)
    tokenizer = characters(["abc"])
    found = [asked(letters(ids[:2]), letters(ids[2:])) for ids in SEQUENCES.tolist()]
    rows, _ = pairs.rows_of(found, tokenizer, 9)
    cfg, _ = load(["tales_asked", *TINY, "--seq_len", "9", "--objective", objective])
    family, passes = families.family_of(cfg), 400
    model = Answers(tokenizer, objective == "ar")
    exact = -(A[SEQUENCES[:, 1], SEQUENCES[:, 2]] * A[SEQUENCES[:, 2], SEQUENCES[:, 3]]).log()
    assert math.isclose(-P.log().sum() + P.view(9, 9).sum(1).log().sum() * 9, exact.sum())
    nll = metrics.bound(model, family, tokenizer, rows, 1 if family.exact else passes)
    assert torch.allclose(nll.double().mean(1) * 3, exact, atol=1e-5 if family.exact else 0.3)
    mean, _, error = metrics.mean_and_errors(nll)
    assert abs(mean * 3 - exact.mean().item()) < (1e-5 if family.exact else 5 * 3 * error)


# --- stories on request ---------------------------------------------------------------------------


def test_the_probability_of_a_story_that_was_asked_for():
    """All stories that a request leaves possible have together the probability 1."""
    pair = requests.generate(1, 1)[0]
    plot, chosen = tales.choices(pair.completion)
    everything = requests.written(list(requests.facts_of(pair.completion).values()))
    possible = {
        variable: choices if variable in ("weather", "time", "spot") else [chosen[variable]]
        for variable, choices in tales.VARIABLES.items()
        if variable in chosen or variable in ("weather", "time", "spot")
    }
    stories = set()
    for one in itertools.product(*tales.PLOTS[plot]):
        for drawn in itertools.product(*possible.values()):
            rendered = tales._Rendered(tales.FORMS, dict(zip(possible, drawn)))
            stories.add(" ".join(one).format_map(rendered))
    assert pair.completion in stories and plot != "night"  # which need not show its object
    total = sum(math.exp(requests.log_prob(asked(everything, story))) for story in stories)
    assert total == pytest.approx(1)


def test_entropy_of_stories_that_were_asked_for():
    """The mean of -log p, and that is the entropy; a request says what it says."""
    found = requests.generate(2, 3000)
    nats = [-requests.log_prob(pair) for pair in found]
    error = statistics.stdev(nats) / math.sqrt(len(nats))
    assert abs(statistics.mean(nats) - requests.entropy()) < 4 * error < 0.4
    assert found == requests.generate(2, 3000)
    assert {len(requests.named(pair.question)) for pair in found} == {0, 1, 2, 3, 4}
    first, second = (next(p for p in found if word in p.question) for word in ("Tom", "Mia"))
    assert requests.obeys(first) and not requests.obeys(Pair(second.prompt, first.completion))
    assert requests.log_prob(asked("A story with a dragon.", first.completion)) == -math.inf
    assert requests.log_prob(Pair(first.prompt, "No story.")) == -math.inf
    assert requests.log_prob(asked("A story.", first.completion)) == tales.log_prob(
        first.completion
    )


# --- training, sampling, judging ------------------------------------------------------------------


def test_from_questions_to_answers(monkeypatch, capsys):
    """A run on a file of one's own, what it writes and how it is judged: the question is given, and
    the text is the answer."""
    asks = "What comes after {}?"
    write([{"prompt": asks.format(n), "completion": f"It is {n + 1}."} for n in range(60)])
    words = ["--data", "pairs.jsonl", *TINY, "--final_samples", "4"]
    cfg, why = load(words)
    assert (cfg.rows, cfg.seq_len, cfg.tokenizer) == ("pair", 65, "char") and "your own data" in why
    code, out, err = run(train.main, words, monkeypatch, capsys)
    assert code == 0, err
    assert "What comes after" in out and "bound_nats_per_token" in out
    model = inference.load("artifacts/models/pairs.best.pt")
    sample = model.generate("What comes after 7?", gen_len=6, no_stop=True)
    assert "What" not in sample.text and "".join(sample.tokens).startswith("What comes after 7?\n")
    blank = sample.trace.frames[0].ids
    assert blank.count(model.tokenizer.mask) == 6 and len(blank) == len(sample.tokens)
    *_, last = model.stream("What comes after 7?", gen_len=6)
    assert "What" not in last.text
    bound = model.nll("It is 8.", 4, prompt="What comes after 7?")
    answer = model.tokenizer.encode(["It is 8."])[0]
    assert bound.tokens == len(answer) + 1 and bound.nats > 0
    with pytest.raises(UserError, match="question and answer would have .* the window has 65"):
        model.generate("What?", gen_len=60)
    with pytest.raises(UserError, match="not --infill"):
        model.generate(infill="It [3] 8.")
    code, out, err = run(evaluate.main, "--num-samples 2 --json r.json", monkeypatch, capsys)
    report = json.load(open("r.json"))
    assert code == 0 and report["bound_nats_per_token"] > 0 and report["samples"]["texts"] == 2


@pytest.mark.parametrize("words", ([], ["--block_len", "4"], ["--objective", "ar"]))
def test_stories_on_request(words, monkeypatch, capsys):
    """Trained, judged exactly, exported, and asked again."""
    code, out, err = run(
        train.main, ["tales_asked", *TINY, "--final_samples", "3", *words], monkeypatch, capsys
    )
    assert code == 0 and "obeying" in out and "exact_nats_per_story" in out, err
    assert '--prompt "A story with a bear' in out
    report = json.load(open("artifacts/logs/tales_asked.json"))
    assert report["reference"]["obeying"] == 1 and report["samples"]["obeying"] == 0
    assert run(export.main, "--output folder", monkeypatch, capsys)[0] == 0
    options = dict(seed=3, gen_len=8, prompt="A story with a bear.")
    texts = [inference.load(path).generate(**options).text for path in ("", "folder")]
    assert texts[0] == texts[1]


def test_fine_tuning_of_a_model_without_markers(monkeypatch, capsys):
    """It keeps what it was, gets the markers, and goes on to pairs; its rows of weights stay."""
    assert run(train.main, ["tales", *TINY, "--name", "base"], monkeypatch, capsys)[0] == 0
    words = ["tales_asked", *TINY, "--init_from", "artifacts/models/base.best.pt"]
    code, out, err = run(train.main, words, monkeypatch, capsys)
    assert code == 2 and "use at least 97, or 113 with the bpe of tales" in err
    words += ["--seq_len", "113"]
    cfg, _ = load(words)
    origin = runs.checkpoint.read(cfg.init_from)
    plain = tokenizers.from_json(origin["tokenizer"])
    tokenizer = corpus.load(cfg, plain).tokenizer
    assert tokenizer.vocab_size == plain.vocab_size + 3
    network = runs.make_model(cfg, tokenizer, origin)
    table, before = network.embedding.weight.detach(), origin["model"]["embedding.weight"]
    assert torch.equal(table[: plain.mask], before[:-1]) and torch.equal(table[-1], before[-1])
    assert torch.allclose(table[plain.mask : -1], before[:-1].mean(0))
    code, out, err = run(train.main, words, monkeypatch, capsys)
    assert code == 0 and "obeying" not in err, err


# --- comparisons ----------------------------------------------------------------------------------

SHAPE = dict(n_layer=1, n_head=2, n_embd=16, batch_size=4, final_rows=4, eval_rows=4)


def test_what_stands_behind_an_answer_is_compared(monkeypatch, capsys):
    """Masked like the answer, always visible, always masked: the latter two without loss there.
    Beginnings of stories are told from other texts."""
    x0 = torch.tensor([[0, 5, 6, 7, 7, 0, 0, 0]])
    drawn = Corruption(torch.tensor([[0, 0, 0, 1, 0, 1, 1, 0]]).bool(), torch.ones(1))
    cfg = toy.settings(rows="pair")
    seen, scored = [], []

    def network(ids, level, select):
        seen.append((ids == 8).int().tolist())
        scored.append(select.tolist())
        return torch.zeros(len(select), 8)

    network.vocab_size = 9
    for kind in (compare_padding.Visible, compare_padding.Hidden):
        loss = kind(cfg).loss(network, x0, drawn)
        assert loss.item() == pytest.approx(2 * math.log(8) / 8)
    assert seen == [[[0, 0, 0, 1, 0, 1, 0, 0]], [[0, 0, 0, 1, 0, 1, 1, 1]]]
    story = tales.generate(1, 1)[0]
    one = ". ".join(story.split(". ")[:1]) + "."
    assert compare_padding.is_beginning(story) and compare_padding.is_beginning(one)
    assert not compare_padding.is_beginning("") and not compare_padding.is_beginning(one[:-1])
    base = variants.base_config
    monkeypatch.setattr(variants, "base_config", lambda options: base(options) | SHAPE)
    monkeypatch.setattr(compare_padding, "PAIRS", 60)
    monkeypatch.setattr(compare_padding, "SAMPLERS", ("confidence",))
    words = "padding --base tales_asked --iters 2 --num_samples 2 --device cpu --out_dir out"
    code, _, err = run(ablate.main, words, monkeypatch, capsys)
    rows = ablate.read_table("out/padding_tales_asked.csv")
    assert code == 0 and [row["behind the end"] for row in rows] == list(compare_padding.BEHIND), (
        err
    )
    assert all(0 <= float(row["ended"]) <= 1 for row in rows)
    assert os.path.getsize("out/padding_tales_asked.png") > 10_000


def test_an_autoregressive_network_goes_on_as_a_shifted_one(monkeypatch, capsys):
    """Which reads what that reads; all compared have as many steps in all."""
    cfg = toy.settings(objective="ar", seq_len=6)
    model = toy.network(8, 1, seq_len=6)
    ids = torch.randint(7, (2, 6), generator=runtime.generator("ids"))
    causal = compare_adapt.Shifted(cfg)
    causal.ask = lambda model, x, index=None: model(x, attention="causal", select=index)
    expected = families.Autoregressive(cfg).logits(model, ids)
    torch.testing.assert_close(causal.logits(model, ids), expected)
    index = torch.tensor([0, 5, 6, 11])
    torch.testing.assert_close(causal.logits(model, ids, index), expected.flatten(0, 1)[index])
    shifted = compare_adapt.Shifted(cfg)
    whole = shifted.logits(model, ids)
    assert torch.equal(whole.flatten(0, 1)[index], shifted.logits(model, ids, index))
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 7
    assert not torch.equal(shifted.logits(model, changed)[:, 0], whole[:, 0])
    base = variants.base_config
    small = lambda options: base(options) | SHAPE | {"seq_len": 67}
    monkeypatch.setattr(variants, "base_config", small)
    words = "adapt --base tales --iters 4 --device cpu --out_dir out"
    code, _, err = run(ablate.main, words, monkeypatch, capsys)
    rows = ablate.read_table("out/adapt_tales.csv")
    assert code == 0 and len(rows) == 11, err
    assert {(row["autoregressive"], row["masked_steps"]) for row in rows} == {
        ("0", "4"),
        ("0.25", "3"),
        ("0.5", "2"),
        ("0.75", "1"),
    }
    assert os.path.getsize("out/adapt_tales.png") > 10_000


def test_guidance_is_compared(monkeypatch, capsys):
    words = ["tales_asked", *TINY, "--final_samples", "0"]
    assert run(train.main, words, monkeypatch, capsys)[0] == 0
    monkeypatch.setattr(compare_requests, "GUIDANCE", (0.0, 1.0))
    words = "guidance --num_samples 2 --device cpu --out_dir out"
    code, _, err = run(ablate.main, words, monkeypatch, capsys)
    rows = ablate.read_table("out/guidance.csv")
    assert code == 0 and len(rows) == 4 and rows[0]["obeying"] == "0", err
    assert float(rows[1]["nfe"]) > float(rows[0]["nfe"])  # two a step
    assert os.path.getsize("out/guidance.png") > 10_000
