"""Corpora: documents -> training batches and held-out rows of token ids, in memory or memory-mapped."""
import contextlib
import hashlib
import json
import os
import re
from functools import partial
from itertools import chain, islice
from typing import Callable, NamedTuple

import numpy as np
import torch

from utils import tales, texts, tokenizer as tokenizers
from utils.cli import UserError, reason
from utils.runtime import generator, is_first, write_json

TALES_HELD_OUT = 2048  # stories
SHORTEST_TALE = 60  # tokens; a tale has 65 words and punctuation marks, which no tokenizer trained here joins
SHARD_TOKENS, SHARD_HELD_OUT = 100_000_000, 0.005  # of prepared shards
PIECE = 300_000  # characters that are encoded at once, some 20 bytes each; longer documents are cut


class Corpus(NamedTuple):
    batch: Callable          # step (int), rows (slice) of the global batch -> (rows, seq_len) long, always the same
    held_out: torch.Tensor   # (R, seq_len) long
    tokenizer: tokenizers.Tokenizer
    tokens: int              # training tokens; 0: without end
    fingerprint: str         # of the training tokens: changes when the corpus does
    training: Callable       # steps of a run, limit -> (N, L) int: tokens that it was trained on, about `limit` at most


# --- tokens and rows ------------------------------------------------------------------------------


def cut(document):
    """A document in pieces of some PIECE characters. A cut is made before a single space, where byte-level BPE never
    joins; in a text without spaces, anywhere."""
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
    """Ids of each of the documents (list of str): list of (n,) int32. Long ones are cut, so that memory stays flat."""
    pieces = [list(cut(document)) for document in documents]
    ids = (np.array(i, np.int32) for batch in in_batches(chain(*pieces)) for i in tokenizer.encode(batch, "the corpus"))
    return [np.concatenate([np.zeros(0, np.int32), *islice(ids, len(part))]) for part in pieces]


def end_of(tokenizer):
    """`<|endoftext|>`, or nothing where the tokenizer has none: (1,) or (0,) int32."""
    return np.array([] if tokenizer.end is None else [tokenizer.end], np.int32)


def token_stream(documents, tokenizer):
    """The documents one after the other, (N,) int32; with an end token, one before the first and one after each."""
    end = end_of(tokenizer)
    return torch.from_numpy(np.concatenate([end] + [part for ids in encode(documents, tokenizer) for part in (ids, end)]))


def document_rows(documents, tokenizer, seq_len):
    """(rows, seq_len) long: `<|endoftext|>`, the document, `<|endoftext|>` to the end.

    A document that is longer than the window takes several rows, each with an `<|endoftext|>` in front: every row
    starts with one, which is what `diffusion.bos_tokens` relies on.
    """
    if tokenizer.end is None:
        raise UserError("rows=document needs a tokenizer with <|endoftext|>, and so a corpus of several documents "
                        "(a line <|endoftext|> between them); or use --rows stream")
    rows = []
    for ids in tokenizer.encode(documents, "the corpus"):
        pieces = [ids[i:i + seq_len - 1] for i in range(0, len(ids), seq_len - 1)]
        rows += [[tokenizer.end, *piece] for piece in pieces]
    table = np.full((len(rows), seq_len), tokenizer.end, dtype=np.int64)
    for row, ids in zip(table, rows):
        row[:len(ids)] = ids
    return torch.from_numpy(table)


def held_out_rows(documents, tokenizer, cfg):
    """The held-out documents as non-overlapping windows; what is left over at the end is dropped."""
    if cfg.rows == "document":
        return document_rows(documents, tokenizer, cfg.seq_len)
    return windows(token_stream(documents, tokenizer), cfg)


def windows(ids, cfg):
    """The held-out ids (N,) as rows (R, seq_len) long."""
    rows = len(ids) // cfg.seq_len
    if not rows:
        raise UserError(f"the held-out part of {cfg.data} has {len(ids)} tokens, less than one window of "
                        f"seq_len={cfg.seq_len}; use more text or a smaller --seq_len")
    return ids[: rows * cfg.seq_len].view(rows, cfg.seq_len).long()


def row_lengths(rows, tokenizer):
    """(R, 2) characters and UTF-8 bytes that the rows stand for."""
    return torch.tensor([[len(tokenizer.decode(row)), tokenizer.num_bytes(row)] for row in rows.tolist()])


# --- corpora --------------------------------------------------------------------------------------


def stream_batch(ids, cfg, step, rows=slice(None)):
    """Windows at uniformly random places of the token stream `ids` (N,), one gather for all."""
    start = torch.randint(len(ids) - cfg.seq_len + 1, (cfg.batch_size, 1), generator=generator(cfg.seed, "rows", step))
    return ids[start[rows] + torch.arange(cfg.seq_len)].long()


def pool_batch(table, cfg, step, rows=slice(None)):
    """Uniformly random rows of the table (N, L)."""
    return table[torch.randint(len(table), (cfg.batch_size,), generator=generator(cfg.seed, "rows", step))[rows]].long()


def tales_held_out(cfg):
    """Held-out stories of a run (list of str)."""
    return tales.generate(f"held out {cfg.seed}", TALES_HELD_OUT)


def tales_batch(tokenizer, cfg, held_out, step, rows=slice(None)):
    """A batch of stories that nobody has seen, none of them in the set `held_out`: one a row, or (rows=stream) windows
    of stories that follow each other."""
    size = cfg.batch_size * cfg.seq_len
    n = cfg.batch_size if cfg.rows == "document" else size // SHORTEST_TALE + 2
    stories = tales.generate(f"train {cfg.seed} {step}", n)
    fresh = [story for story in stories if story not in held_out]
    stories = (fresh * n)[:n]
    if cfg.rows == "document":
        return document_rows(stories[rows], tokenizer, cfg.seq_len)
    ids = token_stream(stories, tokenizer)
    if len(ids) < size:
        raise UserError(f"tokenizer={cfg.tokenizer} joins words; rows=stream of the tales needs one that does not: bpe "
                        "or char")
    start = torch.randint(len(ids) - size + 1, (), generator=generator(cfg.seed, "rows", step))
    return ids[start:start + size].view(cfg.batch_size, cfg.seq_len)[rows].long()


def latest(batch, cfg, steps, limit):
    """The rows of the last batches of a run of so many steps, about `limit` tokens together: (N, L) int."""
    first = steps - max(1, limit // (cfg.batch_size * cfg.seq_len))
    return torch.cat([batch(step).int() for step in range(max(0, first), max(1, steps))])


def load(cfg, tokenizer=None):
    """Corpus of cfg.data. `text` is the tokenizer of a checkpoint to go on with; else cfg.tokenizer decides."""
    if cfg.max_documents and (cfg.data == "tales" or os.path.isdir(cfg.data)):
        raise UserError(f"max_documents={cfg.max_documents} with {cfg.data}: only a text file is cut to its first documents")
    if cfg.data == "tales":
        held_out = tales_held_out(cfg)
        seen = set(held_out)
        if tokenizer is None:
            tokenizer = make_tokenizer(cfg, tales.generate(f"tokenizer {cfg.seed}", 4000), documents=True)
        rows = held_out_rows(held_out, tokenizer, cfg)
        if cfg.rows == "document" and len(rows) != len(held_out):
            raise UserError(f"seq_len={cfg.seq_len} is shorter than a tale with tokenizer={cfg.tokenizer}; "
                            "use at least 67 with bpe, 320 with char")
        batch = partial(tales_batch, tokenizer, cfg, seen)
        return Corpus(batch, rows, tokenizer, 0, fingerprint(rows), partial(latest, batch, cfg))
    if not os.path.exists(cfg.data):
        texts.prepare(cfg.data)
    if os.path.isdir(cfg.data):
        return load_shards(cfg, tokenizer)
    documents = texts.read_documents(cfg.data)
    if cfg.max_documents and len(documents) == 1:
        raise UserError(f"max_documents={cfg.max_documents} with {cfg.data}: it is one document; separate documents by a line "
                        f"{tokenizers.END}")
    train, held_out = texts.split(documents)
    if tokenizer is None:
        tokenizer = make_tokenizer(cfg, documents if cfg.tokenizer == "char" else train, documents=len(documents) > 1)
    rows, train = held_out_rows(held_out, tokenizer, cfg), train[: cfg.max_documents or None]
    if cfg.rows == "document":
        pool = document_rows(train, tokenizer, cfg.seq_len)
        return Corpus(partial(pool_batch, pool, cfg), rows, tokenizer, int((pool != tokenizer.end).sum()), fingerprint(pool),
                      lambda steps, limit: pool[:max(1, limit // cfg.seq_len)])
    ids = token_stream(train, tokenizer)
    if len(ids) < cfg.seq_len:
        raise UserError(f"{cfg.data} has {len(ids)} training tokens, less than one window of "
                        f"seq_len={cfg.seq_len}; use more text or a smaller --seq_len")
    return Corpus(partial(stream_batch, ids, cfg), rows, tokenizer, len(ids), fingerprint(ids),
                  lambda steps, limit: ids[None, :limit])


def fingerprint(ids):
    """Hash (str) of a tensor of ids."""
    return hashlib.sha256(ids.contiguous().numpy()).hexdigest()[:16]


def check_same(data, recorded, cfg):
    """Refuse to go on with a run on other training tokens than those whose fingerprint its checkpoint recorded (None: it
    recorded none)."""
    if recorded and data.fingerprint != recorded:
        raise UserError(f"{cfg.data} is not the text that {cfg.name} was trained on (fingerprint {recorded}, now "
                        f"{data.fingerprint}; {data.tokens:,} training tokens); restore it, or start a new run with "
                        "--init_from")


def make_tokenizer(cfg, sample, documents):
    """Tokenizer for cfg.tokenizer: characters of `sample` (list of str), a BPE trained on it, or a tokenizer file."""
    say = print if is_first() else lambda line: None
    if cfg.tokenizer == "char":
        return tokenizers.train_char(sample, documents)
    if cfg.tokenizer == "bpe":
        return tokenizers.train_bpe(sample, cfg.vocab_size)
    if cfg.tokenizer == tokenizers.DEFAULT and not os.path.exists(cfg.tokenizer):
        say(f"training the tokenizer {cfg.tokenizer} ({cfg.vocab_size:,} tokens)")
        tokenizers.save(tokenizers.train_bpe(sample, cfg.vocab_size), cfg.tokenizer)
    tokenizer = tokenizers.load(cfg.tokenizer)
    say(f"tokenizer {cfg.tokenizer}: {tokenizer.mask:,} tokens and MASK (--tokenizer bpe trains one for this run)")
    return tokenizer


# --- corpora larger than memory: a folder of memory-mapped shards ---------------------------------


def write_shards(folder, source, tokenizer, wanted, settings, progress=lambda tokens: None):
    """Write documents as token shards into `folder`; returns its index (dict). Goes on where an earlier call stopped.

    source    `open_dataset` and its texts as a function: (dataset with state_dict, dataset -> iterator of str)
    wanted    training tokens, at least; less where the source ends
    settings  dict of what the shards are made from; a folder made from something else is refused
    progress  called with the training tokens so far

    The folder holds tokenizer.json, index.json and, for each shard, train_NNNNN.bin and held_out_NNNNN.bin: ids of
    uint16 or uint32, `<|endoftext|>` between documents. One document in 200 is held out, by a hash of its text. A shard
    counts when index.json names it, which is written last, with the source's place: an interruption costs one shard.
    """
    (dataset, read), end = source, end_of(tokenizer)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    index = {"settings": settings, "dtype": np.dtype(dtype).name, "shards": [], "tokens": 0, "documents": 0, "state": None,
             "ended": False}
    path = os.path.join(folder, "index.json")
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(path):
            index = read_index(folder)
            for name, value in settings.items():
                if index["settings"].get(name) != value:
                    raise UserError(f"{folder} was made with {name}={index['settings'].get(name)}, not {value}; give "
                                    "another --output")
            if index["state"]:
                dataset.load_state_dict(index["state"])
        else:
            tokenizers.save(tokenizer, os.path.join(folder, "tokenizer.json"))
        batches = in_batches(() if index["ended"] else read(dataset))
        while index["tokens"] < wanted and not index["ended"]:
            name, counts = f"{len(index['shards']):05d}.bin", {"train": 0, "held_out": 0}
            with contextlib.ExitStack() as stack:
                files = {part: stack.enter_context(open(os.path.join(folder, f"{part}_{name}"), "wb")) for part in counts}
                goal = min(SHARD_TOKENS, wanted - index["tokens"])
                while counts["train"] < goal and (documents := next(batches, None)):
                    index["documents"] += len(documents)
                    documents = [document for document in documents if document and not document.isspace()]
                    for document, ids in zip(documents, encode(documents, tokenizer)):
                        part = "held_out" if texts.is_held_out(document, SHARD_HELD_OUT) else "train"
                        ids = np.append(ids, end).astype(dtype)
                        ids.tofile(files[part])
                        counts[part] += len(ids)
                    progress(index["tokens"] + counts["train"])
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
            index["ended"] = counts["train"] < goal
            index["tokens"] += counts["train"]
            if sum(counts.values()):
                index["shards"].append({"name": name} | counts)
            index["state"] = dataset.state_dict()
            write_json(path, index)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {reason(error)}; the same command goes on from the last whole shard") from None
    return index


def read_index(folder):
    """index.json of a folder of shards (dict)."""
    try:
        with open(os.path.join(folder, "index.json"), encoding="utf-8") as file:
            index = json.load(file)
        if not {"settings", "dtype", "shards", "tokens", "documents", "state", "ended"} <= set(index):
            raise ValueError("it lacks what write_shards writes")
        return index
    except (OSError, ValueError, TypeError):
        raise UserError(f"{folder} is a folder, not a text file, and holds no shards (index.json); scripts/data.py "
                        "--tokens makes some") from None


def load_shards(cfg, tokenizer=None):
    """Corpus of a folder that `write_shards` made, by memory map: each batch reads its own windows only."""
    index = read_index(cfg.data)
    own = tokenizers.load(os.path.join(cfg.data, "tokenizer.json"))
    if tokenizer is not None and tokenizer.to_json() != own.to_json():
        raise UserError(f"{cfg.data} was made with another tokenizer than the checkpoint's")
    if cfg.rows == "document":
        raise UserError(f"rows=document with {cfg.data}: shards are a stream of tokens; use --rows stream")

    def maps(part):
        found = []
        for shard in index["shards"]:
            path = os.path.join(cfg.data, f"{part}_{shard['name']}")
            size = os.path.getsize(path) if os.path.exists(path) else 0
            if size != shard[part] * np.dtype(index["dtype"]).itemsize:
                raise UserError(f"{path} has {size:,} bytes, not what index.json says; copy it again")
            if shard[part] >= cfg.seq_len:
                found.append(np.memmap(path, dtype=index["dtype"], mode="r"))
        return found
    shards = maps("train")
    if not shards:
        raise UserError(f"{cfg.data} has no shard as long as a window of seq_len={cfg.seq_len}")
    held_out, rows = maps("held_out"), max(cfg.eval_rows, cfg.final_rows)
    held_out = np.concatenate([part[: rows * cfg.seq_len] for part in held_out] or [[]])[: rows * cfg.seq_len]
    starts = np.cumsum([0] + [len(shard) - cfg.seq_len + 1 for shard in shards])  # windows before each shard
    return Corpus(partial(shard_batch, shards, starts, cfg), windows(torch.from_numpy(held_out.astype(np.int64)), cfg), own,
                  index["tokens"], hashlib.sha256(repr(index["shards"]).encode()).hexdigest()[:16],
                  lambda steps, limit: torch.from_numpy(shards[0][:limit].astype(np.int32))[None])


def shard_batch(shards, starts, cfg, step, rows=slice(None)):
    """Windows at uniformly random places of the shards."""
    places = torch.randint(int(starts[-1]), (cfg.batch_size,), generator=generator(cfg.seed, "rows", step))[rows].numpy()
    owner = np.searchsorted(starts, places, side="right") - 1
    return torch.from_numpy(np.stack([shards[k][p:p + cfg.seq_len] for k, p in zip(owner, places - starts[owner])])
                            .astype(np.int64))
