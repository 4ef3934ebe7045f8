"""Tokenizers, corpora and canvases."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from config import Config
from utils import built_in, canvas, corpus, encoding, tales, texts, tokenizer
from utils.built_in import BUILT_IN
from utils.cli import UserError

STRINGS = [
    "",
    " ",
    "Hello, world!\n",
    "tabs\tand\r\nbreaks",
    "ümlaut ßharp éàç",
    "漢字かな",
    "😀👩‍👩‍👧",
    "\x00\x07\x7f",
    "a" * 300,
    "<|endoftext|>",
    "[MASK] _ ■",
    "#%&()_=<>",
    "â€œ “real” ”quotes”",
    "\u202e\ufeff",
]


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train_bpe(tales.generate(1, 500), 600)


def test_bpe_round_trips_every_string(bpe):
    every_character = "".join(
        chr(c) for c in list(range(0x3000)) + [0x1F600, 0x10FFFF] if not 0xD800 <= c < 0xE000
    )
    for text in STRINGS + [every_character]:
        ids = bpe.encode([text])[0]
        assert bpe.decode(ids) == text
        assert "".join(bpe.pieces(ids)) == text
        assert all(0 <= i < bpe.mask for i in ids) and bpe.end not in ids


def test_char_round_trips_and_names_unknown_characters():
    chars = tokenizer.train_char(["to be,\nor not"], documents=True)
    assert chars.vocab_size == len(set("to be,\nor not")) + 2 and chars.end == chars.mask - 1
    assert chars.decode(chars.encode(["not\nto, be"])[0]) == "not\nto, be"
    assert chars.pieces(chars.encode(["no\n"])[0]) == ["n", "o", "\n"]
    with pytest.raises(UserError, match="'z'"):
        chars.encode(["toz"])
    with pytest.raises(UserError):  # spelled out it is text, and these characters are not all known
        chars.encode(["<|endoftext|>"])


def test_special_tokens_in_a_text_are_text(bpe):
    assert bpe.end is not None and bpe.end not in bpe.encode(["a<|endoftext|>b"])[0]
    again = tokenizer.from_json(bpe.to_json())
    assert again.encode(STRINGS) == bpe.encode(STRINGS) and again.vocab_size == bpe.vocab_size
    assert bpe.decode([bpe.end, *bpe.encode(["x"])[0], bpe.end]) == "x"


def test_pieces_of_a_character_cut_by_a_mask_are_escaped(bpe):
    ids = bpe.encode(["a漢b"])[0]
    assert len(ids) == 5
    assert bpe.pieces(ids) == ["a", "漢", "", "", "b"]
    ids[2] = bpe.mask
    assert bpe.pieces(ids) == ["a", "\\xe6", "", "\\xa2", "b"]


def test_invalid_unicode_is_one_line(bpe):
    with pytest.raises(UserError, match="not valid Unicode"):
        bpe.encode(["\udcff"])


def test_bytes_are_counted_exactly_where_a_window_cuts_a_character(bpe):
    ids = bpe.encode(["漢字"])[0]
    assert sum(bpe.num_bytes([i]) for i in ids) == bpe.num_bytes(ids) == 6


def test_documents_survive_the_file(tmp_path):
    documents = ["One.\n\nTwo paragraphs.", "A “quoted” story", "last"]
    path = tmp_path / "x.txt"
    assert texts.write_documents(str(path), iter(documents)) == 3
    assert texts.read_documents(str(path)) == documents
    path.write_text("only one\n\ndocument", encoding="utf-8")
    assert texts.read_documents(str(path)) == ["only one\n\ndocument"]
    path.write_text(
        "<|endoftext|>\na <|endoftext|> b\n<|endoftext|>\nc\n<|endoftext|>", encoding="utf-8"
    )
    assert texts.read_documents(str(path)) == ["a <|endoftext|> b", "c"], (
        "only a line of its own separates"
    )
    path.write_text("a\n<|endoftext|>\n<|endoftext|>\n\nb\n", encoding="utf-8")
    assert texts.read_documents(str(path)) == ["a", "\nb\n"]


@pytest.mark.parametrize("kind", ("jsonl", "parquet"))
def test_local_datasets(kind, tmp_path, monkeypatch):
    import datasets

    # it waits that long, in seconds, for threads of pyarrow after a shuffled .parquet file, five by
    # default
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)
    path = str(tmp_path / f"x.{kind}")
    rows = [{"text": f"story {i}", "body": f"body {i}"} for i in range(30)]
    if kind == "jsonl":
        open(path, "w").write("\n".join(map(json.dumps, rows)))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    assert texts.read_documents(path) == [row["text"] for row in rows]
    assert texts.read_documents(path, "body")[3] == "body 3"
    shuffled = list(texts.stream_dataset(path, seed=1, shuffle_buffer=10))
    assert shuffled != texts.read_documents(path) and sorted(shuffled) == sorted(
        row["text"] for row in rows
    )
    assert shuffled == list(texts.stream_dataset(path, seed=1, shuffle_buffer=10))
    with pytest.raises(UserError, match="no column title"):
        texts.read_documents(path, "title")
    open(str(tmp_path / "odd.jsonl"), "w").write('{"text": null, "n": 1}\n{"text": "a", "n": 2}')
    assert texts.read_documents(str(tmp_path / "odd.jsonl")) == ["a"]
    with pytest.raises(UserError, match="holds int, not text"):
        texts.read_documents(str(tmp_path / "odd.jsonl"), "n")


def test_a_tokenizer_is_the_same_each_time():
    """Which ids it gives is a function of the text: the tests, too, train one only once."""
    once, again = (
        tokenizer.train_bpe.__wrapped__(tales.generate(1, 300), 500).to_json() for _ in range(2)
    )
    assert once == again


def test_split_is_by_the_document_alone():
    documents = [f"document number {i}" for i in range(2000)]
    train, held_out = texts.split(documents)
    assert set(train) | set(held_out) == set(documents) and not set(train) & set(held_out)
    assert 150 < len(held_out) < 250
    assert set(texts.split(documents[::-1] + documents[:50])[1]) == set(held_out)
    assert texts.split(["x" * 100]) == (["x" * 90], ["x" * 10])
    for few in (["a", "b"], ["b", "c", "d"]):
        assert all(texts.split(few)), "both parts get something"


def test_mojibake_is_repaired_and_real_quotes_stay():
    repair = texts.repair_mojibake
    for good in ("“real” ‘quotes’ – and château, naïve, £", "â", "100 € “", "Ãdam", "plain"):
        assert repair(good) == good
    for good in ("“Hi,” she said – it’s café", "naïve…", "½"):
        bad = (
            good.encode().decode("cp1252", errors="replace")
            if "”" not in good
            else "".join(
                bytes([b]).decode("cp1252") if b not in (0x9D, 0x81, 0x8D, 0x8F, 0x90) else chr(b)
                for b in good.encode()
            )
        )
        assert bad != good and repair(bad) == good, (bad, repair(bad))
    assert repair("â€œHi.â€ she said") == "“Hi.” she said", (
        "the last byte of ” has no letter in cp1252 and gets lost"
    )


def small(**changes):
    return Config(
        **{
            "n_layer": 1,
            "n_head": 2,
            "n_embd": 16,
            "seq_len": 16,
            "batch_size": 4,
            "vocab_size": 300,
        }
        | changes
    )


def test_stream_batches_are_windows_of_the_text(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("".join(chr(33 + i % 90) for i in range(2000)))
    data = corpus.load(small(data=str(path), tokenizer="char"))
    batch = data.batch(3)
    assert batch.shape == (4, 16) and batch.dtype == torch.long
    assert torch.equal(batch, data.batch(3)) and not torch.equal(batch, data.batch(4))
    for row in batch.tolist():
        assert data.tokenizer.decode(row) in path.read_text()[:1800]
    assert data.held_out.shape == (200 // 16, 16) and data.tokens == 1800
    assert (
        encoding.row_lengths(data.held_out, data.tokenizer).tolist() == [[16, 16]] * 12
        and data.tokenizer.end is None
    )


def test_documents_are_joined_by_the_end_token(tmp_path):
    path = tmp_path / "x.txt"
    texts.write_documents(str(path), (f"Document {i} has some words in it." for i in range(80)))
    data = corpus.load(small(data=str(path), tokenizer="bpe"))
    rows = torch.cat([data.batch(i) for i in range(20)])
    assert (rows == data.tokenizer.end).any() and (data.held_out == data.tokenizer.end).any()
    for size in (8, 64):  # documents shorter and longer than the window
        table = corpus.load(small(data=str(path), rows="document", seq_len=size)).held_out
        assert (table[:, 0] == data.tokenizer.end).all() and (table != data.tokenizer.end).any(
            1
        ).all()
        found = "".join(data.tokenizer.decode(row) for row in table.tolist())
        assert found == "".join(texts.split(texts.read_documents(str(path)))[1])


def test_tales_batches_are_whole_fresh_stories(monkeypatch):
    cfg = small(data="tales", rows="document", seq_len=67, vocab_size=1024)
    data = corpus.load(cfg)
    written = [
        canvas.finished(data.tokenizer, row)
        for step in range(5)
        for row in data.batch(step).tolist()
    ]
    assert len(set(written)) == 20 and all(tales.log_prob(text) > -1e9 for text in written)
    held_out = {canvas.finished(data.tokenizer, row) for row in data.held_out.tolist()}
    assert len(held_out) == built_in.HELD_OUT and not held_out & set(written)
    assert BUILT_IN["tales"].held_out(cfg.seed)[0] in held_out
    stories = tales.generate(f"train {cfg.seed} 0", 4)
    for rows, size in (("document", 67), ("stream", 200)):
        monkeypatch.setattr(built_in.Tales, "held_out", lambda self, seed: [stories[1]])
        batch = corpus.fresh_batch(data.tokenizer, small(data="tales", rows=rows, seq_len=size), 0)
        assert batch.shape == (4, size)
        known = "".join(map(data.tokenizer.decode, batch.tolist()))
        assert stories[2][20:] in known and stories[1][20:] not in known, (
            "a held-out story is never trained on"
        )


def test_tales_as_a_stream():
    cfg = small(data="tales", rows="stream", seq_len=256, vocab_size=1024)
    data = corpus.load(cfg)
    assert torch.equal(data.batch(3), data.batch(3)) and not torch.equal(
        data.batch(3), data.batch(4)
    )
    rows = [*data.batch(0).tolist(), *data.held_out[:4].tolist()]
    stories = [story for row in rows for story in canvas.documents(data.tokenizer, row, "stream")]
    assert len(stories) >= 2 * len(rows) and all(tales.log_prob(story) > -1e9 for story in stories)
    assert len({row[0] for row in data.batch(0).tolist()}) > 1, "windows start anywhere"


def test_tokenizer_never_sees_held_out_text(tmp_path):
    documents = [f"common words {i}" for i in range(200)]
    held_out = texts.split(documents)[1]
    secret = held_out[0] + " qqqqqqqq" * 50
    documents = [secret if d == held_out[0] else d for d in documents]
    if not texts.is_held_out(secret):
        secret += next(str(i) for i in range(1000) if texts.is_held_out(secret + str(i)))
        documents = [secret if d.startswith(held_out[0] + " q") else d for d in documents]
    path = str(tmp_path / "x.txt")
    texts.write_documents(path, documents)
    data = corpus.load(small(data=path, vocab_size=600))
    assert len(data.tokenizer.encode(["qqqq"])[0]) == 4, (
        "no merge of a pair that only the held-out part has"
    )


def test_a_file_that_is_held_out(tmp_path):
    """All of data is trained on, and the other file judged; its characters are known too."""
    train, held = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    texts.write_documents(train, ["abcd " * 50, "dcba " * 50])
    texts.write_documents(held, ["xyz" * 40])
    data = corpus.load(small(data=train, held_out=held, tokenizer="char"))
    end = data.tokenizer.end
    assert data.tokens == 2 * 250 + 3
    assert (
        data.tokenizer.decode(data.held_out.flatten().tolist())
        == ("xyz" * 40)[: data.held_out.numel() - 1]
    )
    assert data.held_out[0, 0] == end and not (data.batch(0, slice(None)) > end).any()
    with pytest.raises(UserError, match="held_out=b.txt with tales: only a text file"):
        corpus.load(small(data="tales", held_out="b.txt"))
    (tmp_path / "b.txt").write_text("xy")
    with pytest.raises(UserError, match="b.txt has 4 tokens, less than one window"):
        corpus.load(small(data=train, held_out=held, tokenizer="char"))


WIKI = [
    " ",
    " = A <unk> = ",
    " ",
    " The first line , of 2 @.@ 5 sentences . ",
    " = Not a title = ",
    " ",
    " = = A section = = ",
    " ",
    " Its text . ",
    " ",
    " = Another = ",
    " ",
    " More . ",
]


def test_articles_of_wikitext(bpe):
    """A title stands alone; the lines are all kept; and their words are counted as the literature
    counts them, also where windows cut them."""
    found = list(texts.articles(WIKI))
    assert len(found) == 2 and "\n".join(found) == "\n".join(WIKI)
    assert found[1].startswith(" = Another = \n \n More")
    assert list(texts.articles([])) == []
    words = sum(len(line.split()) + 1 for line in WIKI)
    ids = encoding.token_stream(found, bpe)
    stream, document = SimpleNamespace(rows="stream"), SimpleNamespace(rows="document")
    assert encoding.words(ids[None], bpe, stream) == words
    assert encoding.words(ids[: len(ids) // 7 * 7].view(-1, 7), bpe, stream) in (words - 1, words)
    for window in (5, 8, 200):  # a document fills several rows, or one
        rows = encoding.document_rows(found, bpe, window)
        assert encoding.words(rows, bpe, document) == words
    chars = tokenizer.train_char(found, documents=False)
    one = encoding.token_stream(found[:1], chars)[None]
    assert encoding.words(one, chars, stream) == words - 8


@pytest.mark.parametrize(
    "content, message",
    (
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"too short", "less than one window"),
    ),
)
def test_bad_corpora(tmp_path, content, message):
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        corpus.load(small(data=str(path), tokenizer="char"))


def test_missing_and_unreadable_corpora(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        corpus.load(small(data=str(tmp_path / "none.txt")))
    with pytest.raises(UserError, match="is a folder"):
        corpus.load(small(data=str(tmp_path)))
    bad = tmp_path / "x.jsonl"
    bad.write_text("{not json")
    with pytest.raises(UserError, match="cannot be read"):
        corpus.load(small(data=str(bad)))


def test_no_network_is_one_line(monkeypatch):
    import urllib.request

    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(UserError, match="without a network give a local file"):
        list(texts.stream_dataset("roneneldan/TinyStories"))
    with pytest.raises(UserError, match="python train.py tales"):
        texts.download("shakespeare")


def test_failed_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def broken():
        yield "new"
        raise UserError("the stream ended")

    with pytest.raises(UserError):
        texts.write_documents(str(path), broken())
    with pytest.raises(UserError, match="no documents"):
        texts.write_documents(str(path), iter([]))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


def test_canvas(bpe):
    encode = lambda s: bpe.encode([s])[0]
    assert canvas.build(bpe, ["Once upon", 5], 32) == [
        bpe.end,
        *encode("Once upon"),
        *[bpe.mask] * 5,
    ]
    assert canvas.build(bpe, [None], 32) == [bpe.end] + [bpe.mask] * 31
    row = canvas.build(bpe, ["Once upon ", None, " The end."], 32)
    assert (
        row
        == [
            bpe.end,
            *encode("Once upon"),
            *[bpe.mask] * (31 - len(encode("Once upon") + encode(" The end."))),
            *encode(" The end."),
        ]
        and len(row) == 32
    )
    with pytest.raises(UserError, match="leaves no room"):
        canvas.build(bpe, [" ".join(["upon"] * 40), None], 32)
    assert len(canvas.build(bpe, ["Once", 100], 32)) == 101 + len(encode("Once")), (
        "beyond the window, if asked for"
    )
    char = tokenizer.train_char(["abc "], documents=False)
    assert canvas.build(char, ["ab ", 3], 8) == [1, 2, 0, 4, 4, 4]


def test_infill(bpe):
    assert canvas.parse_infill("Tom [8] a [3] boat.") == ["Tom ", 8, " a ", 3, " boat."]
    assert canvas.parse_infill("[___]") == [5] and canvas.parse_infill("a[_][2]") == ["a", 5, 2]
    assert canvas.parse_infill(r"\[8] [1] \\x") == ["[8] ", 1, " \\x"]
    assert canvas.parse_infill(r"\[8\] [1]") == ["[8] ", 1]
    for wrong, message in (
        ("none", "no hole"),
        ("a [b] [2]", "is no hole"),
        ("a [2", "is no hole"),
        ("[0]", "no hole"),
    ):
        with pytest.raises(UserError, match=message):
            canvas.parse_infill(wrong)
    row = canvas.build(bpe, canvas.parse_infill("Tom [2] a kite."), 32)
    assert row == [
        bpe.end,
        *bpe.encode(["Tom"])[0],
        bpe.mask,
        bpe.mask,
        *bpe.encode([" a kite."])[0],
    ]


def test_finished(bpe):
    story, end = bpe.encode(["A story."])[0], bpe.end
    assert canvas.finished(bpe, [end, *story, end, *story]) == "A story."
    assert canvas.finished(bpe, [end, *story]) == "A story."
    assert (
        canvas.finished(bpe, [end, *story, end, *story], stop=False)
        == "A story.\n<|endoftext|>\nA story."
    )
    blank = [end, bpe.mask, *story, bpe.mask]
    assert canvas.finished(bpe, [end, end, *story, end], blank) == "\n<|endoftext|>\nA story.", (
        "given text stays"
    )
    stream = [*story, end, *story]
    assert canvas.finished(bpe, stream, [*story, bpe.mask, *[bpe.mask] * len(story)]) == "A story."


def test_a_bpe_reads_a_part_of_what_is_very_long(monkeypatch):
    """Whole documents, or pieces of long ones, from all over the text."""
    monkeypatch.setattr(tokenizer, "BPE_READS", 4000)
    late = "a red kite " * 400 + "xyzzy plugh " * 400
    for documents in (["title", late], [late] * 3):
        pieces = list(tokenizer.spread(documents))
        assert 3900 < sum(map(len, pieces)) < 4100 and "a red kite " in pieces[1]
        assert sum("xyzzy" in piece for piece in pieces) == pytest.approx(len(pieces) / 2, rel=0.1)
    stories = [f"Once upon a time {n} {'o' * (n % 7)}" for n in range(1000)]
    read = list(tokenizer.spread(stories))
    assert set(read) <= set(stories) and 3900 < sum(map(len, read)) < 4100
    assert list(tokenizer.spread(stories[:100])) == stories[:100]
    both = tokenizer.train_bpe(["a red kite " * 400, "xyzzy plugh " * 400], 300)
    assert len(both.encode(["red kite"])[0]) <= 3 and len(both.encode([" xyzzy"])[0]) <= 2
