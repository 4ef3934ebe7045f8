"""Documents -> token ids -> rows, and what a corpus is: training batches and held-out rows."""

import re
from collections.abc import Callable
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from utils import pairs
from utils import tokenizer as tokenizers
from utils.cli import UserError
from utils.runtime import is_first

SHOWN = 20_000_000  # characters, whose encoding takes a few seconds
PIECE = 300_000  # characters that are encoded at once, some 20 bytes each; longer documents are cut


class Corpus(NamedTuple):
    # step (int), rows (slice) of the global batch -> (rows, seq_len) long, always the same
    batch: Callable
    held_out: torch.Tensor  # (R, seq_len) long
    tokenizer: tokenizers.Tokenizer
    tokens: int  # training tokens; 0: without end
    fingerprint: str  # of the training tokens: changes when the corpus does
    # steps of a run, limit -> (N, L) int: tokens that it was trained on, about `limit` at most
    training: Callable


def cut(document):
    """A document in pieces of some PIECE characters. A cut is made before a single space, where
    byte-level BPE never joins; in a text without spaces, anywhere."""
    start, space = 0, re.compile(r"(?<=\S) (?=\S)")
    while start < len(document):
        end = start + PIECE
        found = space.search(document, end, end + PIECE)
        end = found.start() if found else end
        yield document[start:end]
        start = end


def in_batches(texts):
    """The texts (iterable of str) in lists of some PIECE characters together, one text at least."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(documents, tokenizer):
    """Ids of each of the documents (list of str): list of (n,) int32. Long ones are cut, so that
    memory stays flat. What takes a while has a progress bar."""
    pieces, size = [list(cut(document)) for document in documents], sum(map(len, documents))

    def encoded(bar):
        for batch in in_batches(chain(*pieces)):
            yield from (np.array(i, np.int32) for i in tokenizer.encode(batch, "the corpus"))
            bar.update(sum(map(len, batch)))

    hidden = None if size > SHOWN and is_first() else True  # None: shown on a terminal
    with tqdm(total=size, unit="char", unit_scale=True, leave=False, disable=hidden) as bar:
        ids = encoded(bar)
        return [np.concatenate([np.zeros(0, np.int32), *islice(ids, len(part))]) for part in pieces]


def end_of(tokenizer):
    """`<|endoftext|>`, or nothing where the tokenizer has none: (1,) or (0,) int32."""
    return np.array([] if tokenizer.end is None else [tokenizer.end], np.int32)


def token_stream(documents, tokenizer):
    """The documents one after the other, (N,) int32; with an end token, one before the first and
    one after each."""
    end = end_of(tokenizer)
    return torch.from_numpy(
        np.concatenate(
            [end] + [part for ids in encode(documents, tokenizer) for part in (ids, end)]
        )
    )


def document_rows(documents, tokenizer, seq_len):
    """(rows, seq_len) long: `<|endoftext|>`, the document, `<|endoftext|>` to the end.

    A document that is longer than the window takes several rows, each with an `<|endoftext|>` in
    front: every row starts with one, which is what `diffusion.bos_tokens` relies on.
    """
    if tokenizer.end is None:
        raise UserError(
            "rows=document needs a tokenizer with <|endoftext|>, and so a corpus of several "
            "documents (a line <|endoftext|> between them); or use --rows stream"
        )
    rows = []
    for ids in tokenizer.encode(documents, "the corpus"):
        pieces = [ids[i : i + seq_len - 1] for i in range(0, len(ids), seq_len - 1)]
        rows += [[tokenizer.end, *piece] for piece in pieces]
    table = np.full((len(rows), seq_len), tokenizer.end, dtype=np.int64)
    for row, ids in zip(table, rows):
        row[: len(ids)] = ids
    return torch.from_numpy(table)


def held_out_rows(documents, tokenizer, cfg):
    """The held-out documents as non-overlapping windows; what is left over at the end is
    dropped. Of pairs, a list of them, one a row."""
    if cfg.rows == "pair":
        return pair_rows(documents, tokenizer, cfg, "held-out")
    if cfg.rows == "document":
        return document_rows(documents, tokenizer, cfg.seq_len)
    return windows(token_stream(documents, tokenizer), cfg)


def pair_rows(found, tokenizer, cfg, what):
    """`pairs.rows_of` those that are found; says how many are left out. what: "training" or
    "held-out"."""
    rows, left_out = pairs.rows_of(found, tokenizer, cfg.seq_len)
    if not len(rows):
        raise UserError(
            f"no {what} pair of {cfg.data} fits into seq_len={cfg.seq_len} tokens with its end; "
            "use a larger --seq_len"
        )
    if left_out and is_first():
        print(
            f"{left_out:,} of {len(found):,} {what} pairs of {cfg.data} are left out: they do not "
            f"fit into seq_len={cfg.seq_len} tokens with their end"
        )
    return rows


def given_of(rows, tokenizer, cfg):
    """What is given in rows (R, L) long, another part in each: (R, L) bool; None where that is BOS
    alone, as it is of all rows but pairs."""
    return pairs.given(rows, tokenizer) if cfg.rows == "pair" else None


def count_tokens(rows, tokenizer, cfg):
    """In how many tokens, each row's (R,) long, the loss and the bound of rows (R, L) are stated:
    all L; of pairs those of the answer and its end."""
    if cfg.rows == "pair":
        return pairs.answer_lengths(rows, tokenizer)
    return torch.full((len(rows),), rows.size(1))


def windows(ids, cfg):
    """The held-out ids (N,) as rows (R, seq_len) long."""
    rows = len(ids) // cfg.seq_len
    if not rows:
        raise UserError(
            f"{cfg.held_out or f'the held-out part of {cfg.data}'} has {len(ids)} tokens, less "
            f"than one window of seq_len={cfg.seq_len}; use more text or a smaller --seq_len"
        )
    return ids[: rows * cfg.seq_len].view(rows, cfg.seq_len).long()


def without_given(rows, tokenizer, cfg):
    """The rows (R, L), of pairs with `<|endoftext|>`, which reads as nothing, for what is given."""
    given = given_of(rows, tokenizer, cfg)
    return rows if given is None else rows.masked_fill(given, tokenizer.end)


def words(rows, tokenizer, cfg):
    """How many words the rows (R, L) stand for, one after the other, as results on WikiText and the
    Penn Treebank count them: what white space separates, and an `<eos>` for the end of each line
    (empty ones too) and of each document."""
    if cfg.rows != "stream":  # the first token is given, and a full row goes on in the next
        rows = rows[:, 1:]
    count, document = 0, []
    for i in [*rows.flatten().tolist(), tokenizer.end]:
        if i != tokenizer.end:
            document.append(i)
        elif document:
            lines = tokenizer.decode(document).split("\n")
            count, document = count + sum(len(line.split()) + 1 for line in lines), []
    return count


def row_lengths(rows, tokenizer):
    """(R, 2) characters and UTF-8 bytes that the rows stand for."""
    return torch.tensor(
        [[len(tokenizer.decode(row)), tokenizer.num_bytes(row)] for row in rows.tolist()]
    )
