"""Corpora larger than memory: a folder of memory-mapped shards of token ids."""

import contextlib
import hashlib
import json
import os
from functools import partial

import numpy as np
import torch

from utils import texts
from utils import tokenizer as tokenizers
from utils.cli import UserError, reason
from utils.encoding import Corpus, encode, end_of, in_batches, windows
from utils.runtime import generator, write_json

SHARD_TOKENS, SHARD_HELD_OUT = 100_000_000, 0.005  # of prepared shards


def write_shards(folder, source, tokenizer, wanted, settings, progress=lambda tokens: None):
    """Write documents as token shards into `folder`; returns its index (dict). Goes on where an
    earlier call stopped.

    source    `open_dataset` and its texts as a function: (dataset with state_dict, dataset ->
              iterator of str)
    wanted    training tokens, at least; less where the source ends
    settings  dict of what the shards are made from; a folder made from something else is refused
    progress  called with the training tokens so far

    The folder holds tokenizer.json, index.json and, for each shard, train_NNNNN.bin and
    held_out_NNNNN.bin: ids of uint16 or uint32, `<|endoftext|>` between documents. One document in
    200 is held out, by a hash of its text. A shard counts when index.json names it, which is
    written last, with the source's place: an interruption costs one shard.
    """
    dataset, read = source
    try:
        os.makedirs(folder, exist_ok=True)
        index = begin_index(folder, tokenizer, settings)
        if index["state"]:
            dataset.load_state_dict(index["state"])
        batches = in_batches(() if index["ended"] else read(dataset))
        while index["tokens"] < wanted and not index["ended"]:
            before, name = index["tokens"], f"{len(index['shards']):05d}.bin"
            goal = min(SHARD_TOKENS, wanted - before)
            path_of = lambda part: os.path.join(folder, f"{part}_{name}")
            so_far = lambda tokens: progress(before + tokens)
            counts, documents = write_shard(
                path_of, batches, goal, tokenizer, index["dtype"], so_far
            )
            if sum(counts.values()):
                index["shards"].append({"name": name} | counts)
            index["tokens"] += counts["train"]
            index["documents"] += documents
            index["ended"] = counts["train"] < goal
            index["state"] = dataset.state_dict()
            write_json(os.path.join(folder, "index.json"), index)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {reason(error)}; the same command goes on from the last whole "
            "shard"
        ) from None
    return index


def begin_index(folder, tokenizer, settings):
    """The index (dict) of the shards that the folder has, if they were made from these settings; or
    a new one, beside which the tokenizer is written."""
    if not os.path.exists(os.path.join(folder, "index.json")):
        tokenizers.save(tokenizer, os.path.join(folder, "tokenizer.json"))
        return {
            "settings": settings,
            "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
            "shards": [],
            "tokens": 0,
            "documents": 0,
            "state": None,
            "ended": False,
        }
    index = read_index(folder)
    for name, value in settings.items():
        if (theirs := index["settings"].get(name)) != value:
            raise UserError(
                f"{folder} was made with {name}={theirs}, not {value}; give another --output"
            )
    return index


def write_shard(path_of, batches, goal, tokenizer, dtype, progress):
    """Write one shard of batches (iterator of lists of documents), until it has `goal` training
    tokens or none is left, to the files path_of("train") and path_of("held_out"); returns (tokens
    of each, number of documents)."""
    counts, seen, end = {"train": 0, "held_out": 0}, 0, end_of(tokenizer)
    with contextlib.ExitStack() as stack:
        files = {part: stack.enter_context(open(path_of(part), "wb")) for part in counts}
        while counts["train"] < goal and (documents := next(batches, None)):
            seen += len(documents)
            documents = [document for document in documents if document and not document.isspace()]
            for document, ids in zip(documents, encode(documents, tokenizer)):
                part = "held_out" if texts.is_held_out(document, SHARD_HELD_OUT) else "train"
                ids = np.append(ids, end).astype(dtype)
                ids.tofile(files[part])
                counts[part] += len(ids)
            progress(counts["train"])
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return counts, seen


def read_index(folder):
    """index.json of a folder of shards (dict)."""
    try:
        with open(os.path.join(folder, "index.json"), encoding="utf-8") as file:
            index = json.load(file)
        if not {"settings", "dtype", "shards", "tokens", "documents", "state", "ended"} <= set(
            index
        ):
            raise ValueError("it lacks what write_shards writes")
        return index
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{folder} is a folder, not a text file, and holds no shards (index.json); "
            "scripts/data.py --tokens makes some"
        ) from None


def load_shards(cfg, tokenizer=None):
    """Corpus of a folder that `write_shards` made, by memory map: each batch reads its own windows
    only."""
    index = read_index(cfg.data)
    own = tokenizers.load(os.path.join(cfg.data, "tokenizer.json"))
    if tokenizer is not None and tokenizer.to_json() != own.to_json():
        raise UserError(f"{cfg.data} was made with another tokenizer than the checkpoint's")
    if cfg.rows != "stream":
        raise UserError(
            f"rows={cfg.rows} with {cfg.data}: shards are a stream of tokens; use --rows stream"
        )

    def maps(part):
        found = []
        for shard in index["shards"]:
            path = os.path.join(cfg.data, f"{part}_{shard['name']}")
            size = os.path.getsize(path) if os.path.exists(path) else 0
            if size != shard[part] * np.dtype(index["dtype"]).itemsize:
                raise UserError(
                    f"{path} has {size:,} bytes, not what index.json says; copy it again"
                )
            if shard[part] >= cfg.seq_len:
                found.append(np.memmap(path, dtype=index["dtype"], mode="r"))
        return found

    shards = maps("train")
    if not shards:
        raise UserError(f"{cfg.data} has no shard as long as a window of seq_len={cfg.seq_len}")
    held_out, rows = maps("held_out"), max(cfg.eval_rows, cfg.final_rows)
    held_out = np.concatenate([part[: rows * cfg.seq_len] for part in held_out] or [[]])[
        : rows * cfg.seq_len
    ]
    # windows before each shard
    starts = np.cumsum([0] + [len(shard) - cfg.seq_len + 1 for shard in shards])
    return Corpus(
        partial(shard_batch, shards, starts, cfg),
        windows(torch.from_numpy(held_out.astype(np.int64)), cfg),
        own,
        index["tokens"],
        hashlib.sha256(repr(index["shards"]).encode()).hexdigest()[:16],
        lambda steps, limit: torch.from_numpy(shards[0][:limit].astype(np.int32))[None],
    )


def shard_batch(shards, starts, cfg, step, rows=slice(None)):
    """Windows at uniformly random places of the shards."""
    places = torch.randint(
        int(starts[-1]), (cfg.batch_size,), generator=generator(cfg.seed, "rows", step)
    )[rows].numpy()
    owner = np.searchsorted(starts, places, side="right") - 1
    return torch.from_numpy(
        np.stack(
            [shards[k][p : p + cfg.seq_len] for k, p in zip(owner, places - starts[owner])]
        ).astype(np.int64)
    )
