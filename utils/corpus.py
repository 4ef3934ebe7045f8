"""Corpora: documents -> training batches and held-out rows of token ids.

A prepared text file separates documents by a line that holds only `<|endoftext|>`. Documents stay whole: each goes to
training or to the held-out part by a hash of its text, so the same document is never in both, and the tokenizer,
which is trained on the training part only, never sees held-out text. (An alphabet of characters is that of the whole
corpus, as is usual: it has nothing to learn from frequencies.)
"""
import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import zipfile
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
BENCHMARK = "http://mattmahoney.net/dc/{}.zip"  # enwik8 and text8, the first 100 MB of Wikipedia as it was in 2006
DOWNLOADS = ("shakespeare", "text8", "enwik8")
LOCAL = (".jsonl", ".json", ".parquet")
SHARD_TOKENS, SHARD_DOCUMENTS, SHARD_HELD_OUT = 100_000_000, 1000, 0.005  # of prepared shards; documents at once
PIECE = 1_000_000  # characters of a long document that are encoded at once


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
    if path.endswith(LOCAL):
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


@contextlib.contextmanager
def reading(name):
    """Turn the errors of `datasets`, of which there are dozens of kinds, its own and its backends', into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001
        if name.endswith(LOCAL):
            raise UserError(f"{name} cannot be read: {reason(error)}") from None
        raise UserError(f"cannot stream {name} from the Hugging Face hub ({reason(error)}); without a network give a local "
                        "file: --dataset FILE.txt, .jsonl or .parquet, or --dataset tales") from None


def open_dataset(name, split="train", config=None):
    """A Hugging Face dataset, or a local .jsonl or .parquet file, as a `datasets.IterableDataset`: never downloaded or
    held in memory as a whole."""
    import datasets  # here, because it takes seconds to import and most runs do not need it
    with reading(name):
        if name.endswith(LOCAL):
            kind = "parquet" if name.endswith(".parquet") else "json"
            return datasets.load_dataset(kind, data_files=name, split="train", streaming=True)
        return datasets.load_dataset(name, config, split=split, streaming=True)


def texts_of(dataset, name, column="text"):
    """Documents (iterator of str) in the column of an `open_dataset`."""
    with reading(name):
        for row in dataset:
            if column not in row:
                raise UserError(f"{name} has no column {column}, but {', '.join(row)}; "
                                "scripts/data.py chooses one with --text-column")
            if row[column] is None:
                continue
            if not isinstance(row[column], str):
                raise UserError(f"the column {column} of {name} holds {type(row[column]).__name__}, not text")
            yield row[column]


def stream_dataset(name, split="train", config=None, column="text", seed=None, shuffle_buffer=10_000):
    """Documents (iterator of str) of a dataset; with a seed, shuffled through a buffer of `shuffle_buffer`."""
    dataset = open_dataset(name, split, config)
    if seed is not None:
        dataset = dataset.shuffle(seed=seed, buffer_size=shuffle_buffer)
    yield from texts_of(dataset, name, column)


def download(name):
    """The text (str) of shakespeare (1,115,394 characters), enwik8 or text8."""
    import urllib.request
    url = SHAKESPEARE if name == "shakespeare" else BENCHMARK.format(name)
    print(f"fetching {name} from {url}")
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
        return (content if name == "shakespeare" else zipfile.ZipFile(io.BytesIO(content)).read(name)).decode()
    except (OSError, http.client.HTTPException, zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"cannot fetch {name} ({error}); without a network put a copy at data/{name}.txt, or train on the "
                        "built-in tales: python train.py tales") from None


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
    if path in (f"data/{name}.txt" for name in DOWNLOADS):
        write_documents(path, [download(os.path.basename(path).removesuffix(".txt"))])
    elif path.endswith(".bin"):
        raise UserError(f"there is no {path}; make it with: python scripts/data.py --dataset fineweb-edu --tokens 10B "
                        f"--tokenizer artifacts/tokenizer/fineweb.json --output {path} (README, Large corpora)")
    elif path == "data/stories.txt":
        print(f"streaming 10,000 stories of {STORIES} from the Hugging Face hub to {path}")
        write_documents(path, map(repair_mojibake, islice(stream_dataset(STORIES, seed=1337), 10_000)))


def split_documents(text):
    """The text of a prepared file -> its documents."""
    parts = re.split(rf"(?m)^{re.escape(tokenizer.END)}$", text)
    return [part.removeprefix("\n" * (i > 0)).removesuffix("\n" * (i < len(parts) - 1)) for i, part in enumerate(parts)]


def is_held_out(document, share=HELD_OUT):
    """Whether `document` belongs to the held-out part: a function of its text alone."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") < share * 2**64


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


def token_stream(documents, text):
    """The documents one after the other, (N,) int32; with an end token, one before the first and one after each."""
    end = np.array([] if text.end is None else [text.end], np.int32)
    pieces = ((piece, number == 0) for document in documents for number, piece in enumerate(cut(document)))
    parts = []
    while several := list(islice(pieces, SHARD_DOCUMENTS)):
        for ids, (_, first) in zip(text.encode([piece for piece, _ in several], "the corpus"), several):
            parts += [end] * first + [np.array(ids, np.int32)]
    return torch.from_numpy(np.concatenate([*parts, end]))


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
    return windows(token_stream(documents, text), cfg)


def windows(ids, cfg):
    """The held-out ids (N,) as rows (R, block_size) long."""
    rows = len(ids) // cfg.block_size
    if not rows:
        raise UserError(f"the held-out part of {cfg.data} has {len(ids)} tokens, less than one window of "
                        f"block_size={cfg.block_size}; use more text or a smaller --block_size")
    return ids[: rows * cfg.block_size].view(rows, cfg.block_size).long()


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
    ids = token_stream(stories, text)
    if len(ids) < size:
        raise UserError(f"tokenizer={cfg.tokenizer} joins words; rows=stream of the tales needs one that does not: bpe "
                        "or char")
    start = torch.randint(len(ids) - size + 1, (), generator=generator(cfg.seed, "rows", step))
    return ids[start:start + size].view(cfg.batch_size, cfg.block_size)[rows].long()


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
    if os.path.isdir(cfg.data):
        return load_shards(cfg, text)
    documents = read_documents(cfg.data)
    train, held_out = split(documents)
    if text is None:
        text = make_tokenizer(cfg, documents if cfg.tokenizer == "char" else train, documents=len(documents) > 1)
    rows = held_out_rows(held_out, text, cfg)
    if cfg.rows == "document":
        pool = document_rows(train, text, cfg.block_size)
        return Corpus(partial(pool_batch, pool, cfg), rows, text, int((pool != text.end).sum()), fingerprint(pool))
    ids = token_stream(train, text)
    if len(ids) < cfg.block_size:
        raise UserError(f"{cfg.data} has {len(ids)} training tokens, less than one window of "
                        f"block_size={cfg.block_size}; use more text or a smaller --block_size")
    return Corpus(partial(stream_batch, ids, cfg), rows, text, len(ids), fingerprint(ids))


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


# --- corpora larger than memory: a folder of memory-mapped shards ------------------------------------------------


def write_shards(folder, source, text, wanted, settings, progress=lambda tokens: None):
    """Write documents as token shards into `folder`; returns its index (dict). Goes on where an earlier call stopped.

    source    `open_dataset` and its texts as a function: (dataset with state_dict, dataset -> iterator of str)
    wanted    training tokens, at least; less where the source ends
    settings  dict of what the shards are made from; a folder made from something else is refused
    progress  called with the training tokens so far

    The folder holds tokenizer.json, index.json and, for each shard, train_NNNNN.bin and held_out_NNNNN.bin: ids of
    uint16 or uint32, `<|endoftext|>` between documents. One document in 200 is held out, by a hash of its text. A shard
    counts when index.json names it, which is written last, with the source's place: an interruption costs one shard.
    """
    dataset, texts = source
    dtype = np.uint16 if text.vocab_size <= 2**16 else np.uint32
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
            tokenizer.save(text, os.path.join(folder, "tokenizer.json"))
        stream = iter(() if index["ended"] else texts(dataset))
        while index["tokens"] < wanted and not index["ended"]:
            name, counts = f"{len(index['shards']):05d}.bin", {"train": 0, "held_out": 0}
            with contextlib.ExitStack() as stack:
                files = {part: stack.enter_context(open(os.path.join(folder, f"{part}_{name}"), "wb")) for part in counts}
                goal = min(SHARD_TOKENS, wanted - index["tokens"])
                while counts["train"] < goal and (documents := list(islice(stream, SHARD_DOCUMENTS))):
                    index["documents"] += len(documents)
                    documents = [document for document in documents if document and not document.isspace()]
                    for document, ids in zip(documents, text.encode(documents, "the corpus")):
                        part = "held_out" if is_held_out(document, SHARD_HELD_OUT) else "train"
                        ids = np.array(ids + ([] if text.end is None else [text.end]), dtype)
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
            with open(f"{path}.tmp", "w", encoding="utf-8") as file:
                json.dump(index, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.tmp", path)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}; the same command goes on from the last whole shard") from None
    return index


def read_index(folder):
    """index.json of a folder of shards (dict)."""
    try:
        with open(os.path.join(folder, "index.json"), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        raise UserError(f"{folder} is a folder, not a text file, and holds no shards (index.json); scripts/data.py "
                        "--tokens makes some") from None


def load_shards(cfg, text=None):
    """Corpus of a folder that `write_shards` made, by memory map: each batch reads its own windows only."""
    index = read_index(cfg.data)
    own = tokenizer.load(os.path.join(cfg.data, "tokenizer.json"))
    if text is not None and text.to_json() != own.to_json():
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
            if shard[part] >= cfg.block_size:
                found.append(np.memmap(path, dtype=index["dtype"], mode="r"))
        return found
    shards = maps("train")
    if not shards:
        raise UserError(f"{cfg.data} has no shard as long as a window of block_size={cfg.block_size}")
    held_out, rows = maps("held_out"), max(cfg.eval_rows, cfg.final_rows)
    held_out = np.concatenate([part[: rows * cfg.block_size] for part in held_out] or [[]])[: rows * cfg.block_size]
    starts = np.cumsum([0] + [len(shard) - cfg.block_size + 1 for shard in shards])  # windows before each shard
    return Corpus(partial(shard_batch, shards, starts, cfg), windows(torch.from_numpy(held_out.astype(np.int64)), cfg), own,
                  index["tokens"], hashlib.sha256(repr(index["shards"]).encode()).hexdigest()[:16])


def shard_batch(shards, starts, cfg, step, rows=slice(None)):
    """Windows at uniformly random places of the shards."""
    places = torch.randint(int(starts[-1]), (cfg.batch_size,), generator=generator(cfg.seed, "rows", step))[rows].numpy()
    owner = np.searchsorted(starts, places, side="right") - 1
    return torch.from_numpy(np.stack([shards[k][p:p + cfg.block_size] for k, p in zip(owner, places - starts[owner])])
                            .astype(np.int64))
