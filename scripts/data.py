"""Prepare a corpus: a text file with a line `<|endoftext|>` between documents.

    python3 scripts/data.py --dataset roneneldan/TinyStories --split train --num-stories 10000 --seed 1337 \\
        --output data/stories.txt                                        any Hugging Face dataset, streamed
    python3 scripts/data.py --dataset shakespeare                        Tiny Shakespeare, to data/shakespeare.txt
    python3 scripts/data.py --dataset my.jsonl --output data/mine.txt    a local .txt, .jsonl or .parquet file
    python3 scripts/data.py --dataset tales --output data/tales.txt      the built-in grammar
"""
import os
import sys
from dataclasses import dataclass
from itertools import islice

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tqdm import tqdm

import config
from config import UserError, field
from utils import corpus, tales


@dataclass(frozen=True)
class DataConfig:
    dataset: str = field(corpus.STORIES, "name on the Hugging Face hub, a local file, shakespeare, or tales", "from")
    split: str = field("train", "of a hub dataset")
    config: str = field(None, "of a hub dataset that has several")
    text_column: str = field("text", "column of .jsonl, .parquet and hub datasets")
    num_stories: int = field(10_000, "documents to take, at most")
    seed: int = field(1337, "of the shuffle")
    shuffle_buffer: int = field(10_000, "documents among which the stream is shuffled")
    output: str = field("", "file to write (default data/stories.txt; data/shakespeare.txt for that)", "to")
    separator: str = field("", "between documents, \\n for a line break (default: a line <|endoftext|>)")
    clean_mojibake: bool = field(True, "put right UTF-8 that was read as Windows-1252")

    def __post_init__(self):
        for name in ("num_stories", "shuffle_buffer"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")


def documents(cfg):
    """Iterator of str."""
    if cfg.dataset == "tales":
        return iter(tales.generate(f"data {cfg.seed}", cfg.num_stories))
    if cfg.dataset == "shakespeare":
        return iter([corpus.download_shakespeare()])
    if cfg.dataset.endswith(".txt"):
        return iter(corpus.read_documents(cfg.dataset))
    if cfg.dataset.endswith((".jsonl", ".json", ".parquet")) and not os.path.exists(cfg.dataset):
        raise UserError(f"there is no file {cfg.dataset}")
    return corpus.stream_dataset(cfg.dataset, cfg.split, cfg.config, cfg.text_column, cfg.seed, cfg.shuffle_buffer)


def main(argv):
    if "--help" in argv or "-h" in argv:
        return config.show_help(DataConfig, __doc__)
    argv = ["--clean_mojibake=false" if word == "--no-clean-mojibake" else word for word in argv]
    positional, overrides = config.parse(argv, DataConfig)
    if positional:
        raise UserError(f"what is {positional[0]}? Name a source with --dataset {positional[0]}")
    cfg = config.merge(DataConfig, overrides)
    output = cfg.output or ("data/shakespeare.txt" if cfg.dataset == "shakespeare" else "data/stories.txt")
    stream = islice(documents(cfg), cfg.num_stories)
    if cfg.clean_mojibake:
        stream = map(corpus.repair_mojibake, stream)
    count = corpus.write_documents(output, tqdm(stream, unit="document", disable=None),
                                   cfg.separator.replace("\\n", "\n"))
    print(f"wrote {count:,} documents, {os.path.getsize(output):,} bytes, to {output}")


if __name__ == "__main__":
    config.run(main)
