"""Corpora in memory: documents -> training batches and held-out rows of token ids."""

import dataclasses
import hashlib
import os
from functools import partial

import torch

from utils import pairs, texts
from utils import tokenizer as tokenizers
from utils.built_in import BUILT_IN
from utils.cli import UserError
from utils.encoding import Corpus, document_rows, held_out_rows, pair_rows, token_stream
from utils.runtime import generator, is_first
from utils.shards import load_shards

# --- corpora --------------------------------------------------------------------------------------


def stream_batch(ids, cfg, step, rows=slice(None)):
    """Windows at uniformly random places of the token stream `ids` (N,), one gather for all."""
    start = torch.randint(
        len(ids) - cfg.seq_len + 1, (cfg.batch_size, 1), generator=generator(cfg.seed, "rows", step)
    )
    return ids[start[rows] + torch.arange(cfg.seq_len)].long()


def pool_batch(table, cfg, step, rows=slice(None)):
    """Uniformly random rows of the table (N, L)."""
    return table[
        torch.randint(len(table), (cfg.batch_size,), generator=generator(cfg.seed, "rows", step))[
            rows
        ]
    ].long()


def fresh_batch(tokenizer, cfg, step, rows=slice(None)):
    """A batch of new texts of a built-in corpus: one a row, or (rows=stream) windows of texts that
    follow each other."""
    made, size = BUILT_IN[cfg.data], cfg.batch_size * cfg.seq_len
    n = cfg.batch_size if cfg.rows != "stream" else size // made.shortest + 2
    found = made.training(cfg.seed, step, n)
    if cfg.rows == "pair":
        return pair_rows(found[rows], tokenizer, cfg, "training")
    if cfg.rows == "document":
        return document_rows(found[rows], tokenizer, cfg.seq_len)
    ids = token_stream(found, tokenizer)
    if len(ids) < size:
        raise UserError(
            f"tokenizer={cfg.tokenizer} joins words; rows=stream of {cfg.data} needs one that does "
            "not: bpe or char"
        )
    start = torch.randint(len(ids) - size + 1, (), generator=generator(cfg.seed, "rows", step))
    return ids[start : start + size].view(cfg.batch_size, cfg.seq_len)[rows].long()


def latest(batch, cfg, steps, limit):
    """The rows of the last batches of a run of so many steps, about `limit` tokens together: (N, L)
    int."""
    first = steps - max(1, limit // (cfg.batch_size * cfg.seq_len))
    return torch.cat([batch(step).int() for step in range(max(0, first), max(1, steps))])


def load(cfg, tokenizer=None):
    """Corpus of cfg.data. tokenizer: that of a checkpoint to go on with; None: cfg.tokenizer
    decides."""
    if cfg.data in BUILT_IN or os.path.isdir(cfg.data):
        for name, what in (
            ("max_documents", "is cut to its first documents"),
            ("held_out", "goes with a held-out file"),
        ):
            if value := getattr(cfg, name):
                raise UserError(f"{name}={value} with {cfg.data}: only a text file {what}")
    if cfg.data in BUILT_IN:
        return load_built_in(cfg, tokenizer)
    if not os.path.exists(cfg.data):
        texts.prepare(cfg.data)
    if os.path.isdir(cfg.data):
        return load_shards(cfg, tokenizer)
    documents = pairs.read(cfg.data) if cfg.rows == "pair" else texts.read_documents(cfg.data)
    if cfg.max_documents and len(documents) == 1:
        raise UserError(
            f"max_documents={cfg.max_documents} with {cfg.data}: it is one document; separate "
            f"documents by a line {tokenizers.END}"
        )
    train, held_out = parts(cfg, documents)
    if tokenizer is None:
        sample = train + held_out if cfg.tokenizer == "char" else train
        several = len(documents) > 1 or bool(cfg.held_out)
        tokenizer = make_tokenizer(cfg, sample, documents=several)
    elif cfg.rows == "pair":
        tokenizer = tokenizers.with_roles(tokenizer)
    rows, train = held_out_rows(held_out, tokenizer, cfg), train[: cfg.max_documents or None]
    if cfg.rows != "stream":
        pair = cfg.rows == "pair"
        pool = (
            pair_rows(train, tokenizer, cfg, "training")
            if pair
            else document_rows(train, tokenizer, cfg.seq_len)
        )
        batch, tokens = partial(pool_batch, pool, cfg), int((pool != tokenizer.end).sum())
        first = lambda steps, limit: pool[: max(1, limit // cfg.seq_len)]
        return Corpus(batch, rows, tokenizer, tokens, fingerprint(pool), first)
    ids = token_stream(train, tokenizer)
    if len(ids) < cfg.seq_len:
        raise UserError(
            f"{cfg.data} has {len(ids)} training tokens, less than one window of "
            f"seq_len={cfg.seq_len}; use more text or a smaller --seq_len"
        )
    batch, first = partial(stream_batch, ids, cfg), lambda steps, limit: ids[None, :limit]
    return Corpus(batch, rows, tokenizer, len(ids), fingerprint(ids), first)


def parts(cfg, documents):
    """(training, held-out) documents, lists of str, or of pairs, of those of cfg.data. The same
    question is never in both."""
    if cfg.held_out:
        read = pairs.read if cfg.rows == "pair" else texts.read_documents
        return documents, read(cfg.held_out)
    if cfg.rows == "pair":
        return texts.split(documents, key=lambda pair: repr(pair.prompt))
    return texts.split(documents)


def load_built_in(cfg, tokenizer=None):
    """Corpus of a built-in one, other texts at every step."""
    made = BUILT_IN[cfg.data]
    held_out = made.held_out(cfg.seed)
    if made.pairs != (cfg.rows == "pair"):
        raise UserError(
            f"rows={cfg.rows} with data={cfg.data}: "
            + ("it is of pairs; use --rows pair" if made.pairs else "it has no pairs")
        )
    if tokenizer is None:
        sample = made.generate(f"tokenizer {cfg.seed}", 4000)
        tokenizer = make_tokenizer(cfg, sample, documents=True)
    elif made.pairs:
        tokenizer = tokenizers.with_roles(tokenizer)
    if made.of_characters and not tokenizer.is_char:
        raise UserError(
            f"tokenizer={cfg.tokenizer} with data={cfg.data}: its cells are characters; use "
            "--tokenizer char"
        )
    rows = held_out_rows(held_out, tokenizer, cfg)
    if cfg.rows != "stream" and len(rows) != len(held_out):
        raise UserError(
            f"seq_len={cfg.seq_len} is shorter than a {made.noun} with "
            f"tokenizer={cfg.tokenizer}; use at least {made.windows}"
        )
    batch = partial(fresh_batch, tokenizer, cfg)
    return Corpus(batch, rows, tokenizer, 0, fingerprint(rows), partial(latest, batch, cfg))


def fingerprint(ids):
    """Hash (str) of a tensor of ids."""
    return hashlib.sha256(ids.contiguous().numpy()).hexdigest()[:16]


def check_same(data, recorded, cfg):
    """Refuse to go on with a run on other training tokens than those whose fingerprint its
    checkpoint recorded (None: it recorded none)."""
    if recorded and data.fingerprint != recorded:
        raise UserError(
            f"{cfg.data} is not the text that {cfg.name} was trained on (fingerprint {recorded}, "
            f"now {data.fingerprint}; {data.tokens:,} training tokens); restore it, or start a new "
            "run with --init_from"
        )


def make_tokenizer(cfg, sample, documents):
    """Tokenizer for cfg.tokenizer: characters of `sample` (list of str), a BPE trained on it, or a
    tokenizer file; with markers where the sample is of pairs."""
    if cfg.rows == "pair":
        said = pairs.texts_of(sample)
        size = max(258, cfg.vocab_size - len(tokenizers.MARKERS))
        plain = dataclasses.replace(cfg, rows="document", vocab_size=size, short_rows=0.0)
        return tokenizers.with_roles(make_tokenizer(plain, said, documents=True))
    say = print if is_first() else lambda line: None
    if cfg.tokenizer == "char":
        return tokenizers.train_char(sample, documents)
    if cfg.tokenizer == "bpe":
        return tokenizers.train_bpe(sample, cfg.vocab_size)
    if cfg.tokenizer == tokenizers.DEFAULT and not os.path.exists(cfg.tokenizer):
        say(f"training the tokenizer {cfg.tokenizer} ({cfg.vocab_size:,} tokens)")
        tokenizers.save(tokenizers.train_bpe(sample, cfg.vocab_size), cfg.tokenizer)
    tokenizer = tokenizers.load(cfg.tokenizer)
    say(
        f"tokenizer {cfg.tokenizer}: {tokenizer.mask:,} tokens and MASK (--tokenizer bpe trains "
        "one for this run)"
    )
    return tokenizer
