"""Corpora: documents -> training batches and held-out rows of token ids.

A prepared text file separates documents by a line that holds only `<|endoftext|>`. Documents stay whole: each goes to
training or to the held-out part by a hash of its text, so the same document is never in both, and the tokenizer,
which is trained on the training part only, never sees held-out text. (An alphabet of characters is that of the whole
corpus, as is usual: it has nothing to learn from frequencies.)
"""
import hashlib
import os
import re
from functools import partial
from itertools import islice
from typing import Callable, NamedTuple

import numpy as np
import torch

from config import UserError, reason
from utils import tales, tokenizer
from utils.runtime import generator

HELD_OUT = 0.1  # share of the documents, or of the text of a single one
TALES_HELD_OUT = 2048  # stories
SHORTEST_TALE = 60  # tokens; a tale has 65 words and punctuation marks, which no tokenizer trained here joins
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
STORIES = "roneneldan/TinyStories"


class Corpus(NamedTuple):
    batch: Callable          # step (int), rows (slice) of the global batch -> (rows, block_size) long, always the same
    held_out: torch.Tensor   # (R, block_size) long
    text: tokenizer.Text
    tokens: int              # training tokens; 0: without end
    fingerprint: str         # of the training tokens: changes when the corpus does


# --- documents --------------------------------------------------------------------------------------------------


def read_documents(path, column="text"):
    """Documents (list of str) of a local .txt, .jsonl or .parquet file; `column` of the latter two."""
    if not os.path.exists(path):
        raise UserError(f"there is no file {path}; scripts/data.py makes corpora, --data takes any .txt, .jsonl "
                        "or .parquet file")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, not a text file")
    if path.endswith((".jsonl", ".json", ".parquet")):
        documents = list(stream_dataset(path, column=column))
    else:
        try:
            documents = split_documents(open(path, encoding="utf-8").read())
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error}") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from None
    documents = [document for document in documents if document and not document.isspace()]
    if not documents:
        raise UserError(f"{path} is empty")
    return documents


def stream_dataset(name, split="train", config=None, column="text", seed=None, shuffle_buffer=10_000):
    """Documents (iterator of str) of a Hugging Face dataset, or of a local .jsonl or .parquet file, never downloaded
    or held in memory as a whole. With a seed they come shuffled through a buffer of `shuffle_buffer`."""
    import datasets  # here, because it takes seconds to import and most runs do not need it
    local = name.endswith((".jsonl", ".json", ".parquet"))
    try:
        if local:
            kind = "parquet" if name.endswith(".parquet") else "json"
            stream = datasets.load_dataset(kind, data_files=name, split="train", streaming=True)
        else:
            stream = datasets.load_dataset(name, config, split=split, streaming=True)
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=shuffle_buffer)
        for row in stream:
            if column not in row:
                raise UserError(f"{name} has no column {column}, but {', '.join(row)}; "
                                "scripts/data.py chooses one with --text-column")
            if row[column] is None:
                continue
            if not isinstance(row[column], str):
                raise UserError(f"the column {column} of {name} holds {type(row[column]).__name__}, not text")
            yield row[column]
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - `datasets` raises dozens of kinds, its own and its backends'
        if local:
            raise UserError(f"{name} cannot be read: {reason(error)}") from None
        raise UserError(f"cannot stream {name} from the Hugging Face hub ({reason(error)}); without a network give a local "
                        "file: --dataset FILE.txt, .jsonl or .parquet, or --dataset tales") from None


def download_shakespeare():
    """The text (str) of Tiny Shakespeare, 1,115,394 characters."""
    import urllib.request
    print(f"fetching Tiny Shakespeare (1.1 MB) from {SHAKESPEARE}")
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=60) as response:
            return response.read().decode()
    except OSError as error:
        raise UserError(f"cannot fetch Tiny Shakespeare ({error}); without a network put a copy at "
                        "data/shakespeare.txt, or train on the built-in tales: python train.py tales") from None


_TAIL = {chr(b): b for b in range(0x80, 0xC0)} | {
    bytes([b]).decode("cp1252"): b for b in range(0x80, 0xC0) if b not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)}
_MOJIBAKE = re.compile(f"[\u00c2-\u00f4][{re.escape(''.join(_TAIL))}]{{1,3}}")


def repair_mojibake(text):
    """UTF-8 that somebody read as Windows-1252, put right: the three characters that a quotation mark became are one
    again. Only sequences that are valid UTF-8 change, so real quotation marks and accents stay as they are."""
    def repair(match):
        found = match.group()
        for end in range(len(found), 1, -1):
            try:
                return (bytes([ord(found[0])]) + bytes(_TAIL[c] for c in found[1:end])).decode() + found[end:]
            except UnicodeDecodeError:
                continue
        return "\u201d" + found[2:] if found[:2] == "\u00e2\u20ac" else found  # its last byte has no cp1252 letter
    return _MOJIBAKE.sub(repair, text)


def write_documents(path, documents, separator=None):
    """Write documents (iterable of str) as a prepared text file, all or nothing; returns how many."""
    separator, count, temporary = separator or f"\n{tokenizer.END}\n", 0, f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            for document in documents:
                if document and not document.isspace():
                    file.write(separator * bool(count) + document)
                    count += 1
        if not count:
            raise UserError(f"no documents came; {path} was not written")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return count


def prepare(path):
    """Make the missing corpus of a preset; any other missing file is left to `read_documents`."""
    if path == "data/shakespeare.txt":
        write_documents(path, [download_shakespeare()])
    elif path == "data/stories.txt":
        print(f"streaming 10,000 stories of {STORIES} from the Hugging Face hub to {path}")
        write_documents(path, map(repair_mojibake, islice(stream_dataset(STORIES, seed=1337), 10_000)))


def split_documents(text):
    """The text of a prepared file -> its documents."""
    parts = re.split(rf"(?m)^{re.escape(tokenizer.END)}$", text)
    return [part.removeprefix("\n" * (i > 0)).removesuffix("\n" * (i < len(parts) - 1)) for i, part in enumerate(parts)]


def is_held_out(document):
    """Whether `document` belongs to the held-out part: a function of its text alone."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") < HELD_OUT * 2**64


def split(documents):
    """(training, held-out) documents. A single document is cut at its last tenth; of several, at least one each."""
    if len(documents) == 1:
        cut = int(len(documents[0]) * (1 - HELD_OUT))
        return [documents[0][:cut]], [documents[0][cut:]]
    train, held_out = [], []
    for document in documents:
        (held_out if is_held_out(document) else train).append(document)
    for part, other in ((train, held_out), (held_out, train)):
        if not part:  # a handful of documents may fall on one side
            part.append(other.pop())
    return train, held_out


# --- tokens and rows --------------------------------------------------------------------------------------------


def document_ids(documents, text):
    """One list of ids a document; with an end token, one before the first and one after each."""
    ids = text.encode(documents, "the corpus")
    if text.end is None:
        return ids
    return [([text.end] if i == 0 else []) + document + [text.end] for i, document in enumerate(ids)]


def document_rows(documents, text, block_size):
    """(rows, block_size) long: `<|endoftext|>`, the document, `<|endoftext|>` to the end.

    A document that is longer than the window takes several rows, each with an `<|endoftext|>` in front: every row
    starts with one, which is what `diffusion.given_tokens` relies on.
    """
    if text.end is None:
        raise UserError("rows=document needs a tokenizer with <|endoftext|>, and so a corpus of several documents "
                        "(a line <|endoftext|> between them); or use --rows stream")
    rows = []
    for ids in text.encode(documents, "the corpus"):
        pieces = [ids[i:i + block_size - 1] for i in range(0, len(ids), block_size - 1)]
        rows += [[text.end, *piece] for piece in pieces]
    table = np.full((len(rows), block_size), text.end, dtype=np.int64)
    for row, ids in zip(table, rows):
        row[:len(ids)] = ids
    return torch.from_numpy(table)


def held_out_rows(documents, text, cfg):
    """The held-out documents as non-overlapping windows; what is left over at the end is dropped."""
    if cfg.rows == "document":
        return document_rows(documents, text, cfg.block_size)
    ids = torch.tensor([i for document in document_ids(documents, text) for i in document])
    rows = len(ids) // cfg.block_size
    if not rows:
        raise UserError(f"the held-out part of {cfg.data} has {len(ids)} tokens, less than one window of "
                        f"block_size={cfg.block_size}; use more text or a smaller --block_size")
    return ids[: rows * cfg.block_size].view(rows, cfg.block_size)


def row_lengths(rows, text):
    """(R, 2) characters and UTF-8 bytes that the rows stand for."""
    return torch.tensor([[len(text.decode(row)), text.num_bytes(row)] for row in rows.tolist()])


# --- corpora ----------------------------------------------------------------------------------------------------


def stream_batch(ids, cfg, step, rows=slice(None)):
    """Windows at uniformly random places of the token stream `ids` (N,), one gather for all."""
    start = torch.randint(len(ids) - cfg.block_size + 1, (cfg.batch_size, 1), generator=generator(cfg.seed, "rows", step))
    return ids[start[rows] + torch.arange(cfg.block_size)].long()


def pool_batch(table, cfg, step, rows=slice(None)):
    """Uniformly random rows of the table (N, L)."""
    return table[torch.randint(len(table), (cfg.batch_size,), generator=generator(cfg.seed, "rows", step))[rows]].long()


def tales_held_out(cfg):
    """Held-out stories of a run (list of str)."""
    return tales.generate(f"held out {cfg.seed}", TALES_HELD_OUT)


def tales_batch(text, cfg, held_out, step, rows=slice(None)):
    """A batch of stories that nobody has seen, none of them in the set `held_out`: one a row, or (rows=stream) windows
    of stories that follow each other."""
    size = cfg.batch_size * cfg.block_size
    n = cfg.batch_size if cfg.rows == "document" else size // SHORTEST_TALE + 2
    stories = tales.generate(f"train {cfg.seed} {step}", n)
    fresh = [story for story in stories if story not in held_out]
    stories = (fresh * n)[:n]
    if cfg.rows == "document":
        return document_rows(stories[rows], text, cfg.block_size)
    ids = torch.tensor([i for document in document_ids(stories, text) for i in document])
    if len(ids) < size:
        raise UserError(f"tokenizer={cfg.tokenizer} joins words; rows=stream of the tales needs one that does not: bpe "
                        "or char")
    start = torch.randint(len(ids) - size + 1, (), generator=generator(cfg.seed, "rows", step))
    return ids[start:start + size].view(cfg.batch_size, cfg.block_size)[rows]


def load(cfg, text=None):
    """Corpus of cfg.data. `text` is the tokenizer of a checkpoint to go on with; else cfg.tokenizer decides."""
    if cfg.data == "tales":
        held_out = tales_held_out(cfg)
        seen = set(held_out)
        if text is None:
            text = make_tokenizer(cfg, tales.generate(f"tokenizer {cfg.seed}", 4000), documents=True)
        rows = held_out_rows(held_out, text, cfg)
        if cfg.rows == "document" and len(rows) != len(held_out):
            raise UserError(f"block_size={cfg.block_size} is shorter than a tale with tokenizer={cfg.tokenizer}; "
                            "use at least 67 with bpe, 320 with char")
        return Corpus(partial(tales_batch, text, cfg, seen), rows, text, 0, fingerprint(rows))
    if not os.path.exists(cfg.data):
        prepare(cfg.data)
    documents = read_documents(cfg.data)
    train, held_out = split(documents)
    if text is None:
        text = make_tokenizer(cfg, documents if cfg.tokenizer == "char" else train, documents=len(documents) > 1)
    rows = held_out_rows(held_out, text, cfg)
    if cfg.rows == "document":
        pool = document_rows(train, text, cfg.block_size)
        return Corpus(partial(pool_batch, pool, cfg), rows, text, int((pool != text.end).sum()), fingerprint(pool))
    ids = torch.from_numpy(np.fromiter((i for d in document_ids(train, text) for i in d), dtype=np.int32))
    if len(ids) < cfg.block_size:
        raise UserError(f"{cfg.data} has {len(ids)} training tokens, less than one window of "
                        f"block_size={cfg.block_size}; use more text or a smaller --block_size")
    return Corpus(partial(stream_batch, ids, cfg), rows, text, len(ids), fingerprint(ids))


def fingerprint(ids):
    """Hash (str) of a tensor of ids."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]


def check_same(data, recorded, cfg):
    """Refuse to go on with a run on other training tokens than those whose fingerprint its checkpoint recorded."""
    if data.fingerprint != recorded:
        raise UserError(f"{cfg.data} is not the text that {cfg.name} was trained on (fingerprint {recorded}, now "
                        f"{data.fingerprint}; {data.tokens:,} training tokens); restore it, or start a new run with "
                        "--init_from")


def make_tokenizer(cfg, texts, documents):
    """Text for cfg.tokenizer: characters of `texts`, a BPE trained on `texts`, or a tokenizer file."""
    if cfg.tokenizer == "char":
        return tokenizer.train_char(texts, documents)
    if cfg.tokenizer == "bpe":
        return tokenizer.train_bpe(texts, cfg.vocab_size)
    if cfg.tokenizer == tokenizer.DEFAULT and not os.path.exists(cfg.tokenizer):
        print(f"training the tokenizer {cfg.tokenizer} ({cfg.vocab_size:,} tokens)")
        tokenizer.save(tokenizer.train_bpe(texts, cfg.vocab_size), cfg.tokenizer)
    text = tokenizer.load(cfg.tokenizer)
    print(f"tokenizer {cfg.tokenizer}: {text.mask:,} tokens and MASK (--tokenizer bpe trains one for this run)")
    return text
