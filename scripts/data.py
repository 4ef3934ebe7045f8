"""Prepare a corpus: a text file with a line `<|endoftext|>` between documents.

    # any Hugging Face dataset, streamed
    python3 scripts/data.py --dataset roneneldan/TinyStories --split train \\
        --num-stories 10000 --seed 1337 --output data/stories.txt
    # Tiny Shakespeare, to data/shakespeare.txt
    python3 scripts/data.py --dataset shakespeare
    # a local .txt, .jsonl or .parquet file; the built-in grammar
    python3 scripts/data.py --dataset my.jsonl --output data/mine.txt
    python3 scripts/data.py --dataset tales --output data/tales.txt
    # WikiText-2, the word-level files, to data/wikitext2.txt and data/wikitext2.test.txt
    python3 scripts/data.py --dataset wikitext2
    python3 scripts/data.py --dataset wikitext2 --split test
    python3 scripts/data.py --dataset wiki.valid.tokens.txt --articles --output data/wiki.txt
    # questions and answers: rows of prompt and completion, or of messages
    python3 scripts/data.py --dataset HuggingFaceH4/no_robots --output data/no_robots.jsonl
    # token shards for corpora larger than memory; the same again goes on
    python3 scripts/data.py --dataset fineweb-edu --tokens 10B --tokenizer T.json \\
        --output data/fineweb_edu.bin
"""

import hashlib
import os
import sys
from dataclasses import dataclass
from itertools import islice

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tqdm import tqdm

from config import SEEDS
from utils import cli, pairs, shards, tales, texts
from utils import tokenizer as tokenizers
from utils.cli import UserError, field


@dataclass(frozen=True)
class DataConfig:
    dataset: str = field(
        texts.STORIES,
        "name on the Hugging Face hub, a local file, fineweb-edu, synth, wikitext2, shakespeare, "
        "text8, enwik8 or tales",
        "from",
    )
    split: str = field("train", "of a hub dataset")
    config: str = field(None, "of a hub dataset that has several")
    text_column: str = field("text", "column of .jsonl, .parquet and hub datasets")
    num_stories: int = field(10_000, "documents to take, at most", low=1)
    seed: int = field(1337, "of the shuffle", low=0, high=SEEDS)
    shuffle_buffer: int = field(
        10_000, "documents among which the stream is shuffled", low=1, high=10**7
    )
    output: str = field(
        "",
        "file to write (default: data/stories.txt for TinyStories, data/shakespeare.txt for that)",
        "to",
    )
    tokens: str = field(
        "", "write token shards instead, of at least so many tokens: 500M, 10B; not shuffled"
    )
    tokenizer: str = field("", "tokenizer file of the shards (scripts/train_tokenizer.py)")
    articles: bool = field(False, "its documents are lines of WikiText: write articles, in order")
    separator: str = field(
        "", "between documents, \\n for a line break (default: a line <|endoftext|>)"
    )
    clean_mojibake: bool = field(True, "put right UTF-8 that was read as Windows-1252")

    def __post_init__(self):
        cli.check(self)


# short names: what they are called on the hub, which part, which column
SOURCES = {
    "fineweb-edu": dict(
        dataset="HuggingFaceFW/fineweb-edu", config="sample-10BT", text_column="text"
    ),
    "synth": dict(dataset="PleIAs/SYNTH", text_column="synthetic_answer"),
    "wikitext2": dict(dataset="Salesforce/wikitext", config="wikitext-2-v1", articles=True),
}


def number(text):
    """500M or 10B as an int."""
    digits, unit = text[:-1], {"K": 10**3, "M": 10**6, "B": 10**9}.get(text[-1].upper(), 0)
    try:
        value = int(float(digits) * unit) if unit else int(text)
    except (ValueError, OverflowError):
        value = 0
    if not 1 <= value <= cli.MOST:
        raise UserError(f"tokens={text}: expected a number of tokens, as in 500M or 10B")
    return value


def write_shards(cfg, output, overrides):
    for name in ("num_stories", "seed", "shuffle_buffer", "separator"):
        if name in overrides:
            raise UserError(
                f"{name}={overrides[name]} with tokens={cfg.tokens}: shards hold the whole "
                "source, in its order"
            )
    if not output.endswith(".bin"):
        raise UserError(
            f"output={output} with tokens={cfg.tokens}: name the folder of shards something.bin"
        )
    if not cfg.tokenizer:
        raise UserError(
            f"tokens={cfg.tokens} needs --tokenizer FILE; scripts/train_tokenizer.py makes one"
        )
    if cfg.dataset in (*texts.DOWNLOADS, "tales") or cfg.dataset.endswith(".txt"):
        raise UserError(
            f"dataset={cfg.dataset} with tokens={cfg.tokens}: shards are made from .jsonl, "
            ".parquet and hub datasets; others fit into memory"
        )
    wanted, tokenizer = number(cfg.tokens), tokenizers.load(cfg.tokenizer)
    clean = texts.repair_mojibake if cfg.clean_mojibake else lambda document: document
    read = lambda dataset: map(clean, texts.documents_of(dataset, cfg.dataset, cfg.text_column))
    settings = {
        name: getattr(cfg, name)
        for name in ("dataset", "split", "config", "text_column", "clean_mojibake")
    }
    settings["tokenizer"] = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()[:16]
    done = (
        shards.read_index(output)["tokens"]
        if os.path.exists(os.path.join(output, "index.json"))
        else 0
    )
    with tqdm(total=wanted, initial=done, unit="token", unit_scale=True, disable=None) as bar:
        index = shards.write_shards(
            output,
            (texts.open_dataset(cfg.dataset, cfg.split, cfg.config), read),
            tokenizer,
            wanted,
            settings,
            lambda tokens: bar.update(tokens - bar.n),
        )
    print(
        f"{output} has {index['tokens']:,} training tokens of {index['documents']:,} documents in "
        f"{len(index['shards'])} "
        f"shards" + (", and the source has no more" if index["ended"] else "")
    )


def documents(cfg):
    """Iterator of str."""
    if cfg.dataset == "tales":
        return tales.stream(f"data {cfg.seed}")
    if cfg.dataset in texts.DOWNLOADS:
        return iter([texts.download(cfg.dataset)])
    if cfg.dataset.endswith(".txt"):
        found = iter(texts.read_documents(cfg.dataset))
    else:
        found = texts.stream_dataset(
            cfg.dataset,
            cfg.split,
            cfg.config,
            cfg.text_column,
            None if cfg.articles else cfg.seed,  # lines must stay in order
            cfg.shuffle_buffer,
        )
    if cfg.articles:
        lines = (line for text in found for line in text.removesuffix("\n").split("\n"))
        return texts.articles(lines)
    return found


def run(positional, overrides):
    cfg = cli.merge(
        DataConfig,
        SOURCES.get(overrides.get("dataset"), {}),
        {
            name: value
            for name, value in overrides.items()
            if not (name == "dataset" and value in SOURCES)
        },
    )
    if cfg.dataset.endswith((*texts.LOCAL, ".txt")) and not os.path.exists(cfg.dataset):
        raise UserError(f"there is no file {cfg.dataset}")
    usual = {DataConfig.dataset: "data/stories.txt"} | {
        name: f"data/{name}.txt" for name in texts.DOWNLOADS
    }
    part = "" if cfg.split == "train" else f".{cfg.split}"
    usual |= {SOURCES["wikitext2"]["dataset"]: f"data/wikitext2{part}.txt"}
    output = cfg.output or usual.get(cfg.dataset)
    if not output:
        raise UserError(f"dataset={cfg.dataset} needs --output FILE: where to write it")
    if cfg.tokens:
        return write_shards(cfg, output, overrides)
    if output.endswith(".jsonl"):
        dataset = texts.open_dataset(cfg.dataset, cfg.split, cfg.config)
        dataset = dataset.shuffle(seed=cfg.seed, buffer_size=cfg.shuffle_buffer)
        found = islice(pairs.stream(dataset, cfg.dataset), cfg.num_stories)
        count = pairs.write(output, tqdm(found, unit="pair", disable=None))
        return print(f"wrote {count:,} pairs, {os.path.getsize(output):,} bytes, to {output}")
    stream = islice(documents(cfg), cfg.num_stories)
    if cfg.clean_mojibake:
        stream = map(texts.repair_mojibake, stream)
    count = texts.write_documents(
        output, tqdm(stream, unit="document", disable=None), cfg.separator.replace("\\n", "\n")
    )
    print(f"wrote {count:,} documents, {os.path.getsize(output):,} bytes, to {output}")


main = cli.command(DataConfig, run, __doc__, unexpected="Name a source with --dataset {}")
if __name__ == "__main__":
    cli.run(main)
