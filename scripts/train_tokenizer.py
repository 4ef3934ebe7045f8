"""Train a byte-level BPE on the training part of a prepared corpus; held-out documents are never
read.

    python3 scripts/train_tokenizer.py --input data/stories.txt \\
        --output artifacts/tokenizer/tokenizer.json
"""

import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from utils import cli, texts
from utils import tokenizer as tokenizers
from utils.cli import field


@dataclass(frozen=True)
class TokenizerConfig:
    input: str = field("data/stories.txt", "prepared text file, .jsonl or .parquet")
    output: str = field(tokenizers.DEFAULT, "tokenizer file to write")
    vocab_size: int = field(
        2048, "MASK included, as in a model's vocabulary: the file has one less", low=2, high=2**20
    )
    min_frequency: int = field(2, "pairs that are rarer are not merged", low=0)

    def __post_init__(self):
        cli.check(self)


def run(positional, overrides):
    cfg = cli.merge(TokenizerConfig, overrides)
    train, _ = texts.split(texts.read_documents(cfg.input))
    tokenizer = tokenizers.train_bpe(train, cfg.vocab_size, cfg.min_frequency)
    tokenizers.save(tokenizer, cfg.output)
    ids = sum(map(len, tokenizer.encode(train)))
    print(
        f"wrote {cfg.output}: {tokenizer.mask:,} tokens and MASK, {sum(map(len, train)) / ids:.2f} "
        f"characters a token on {len(train):,} training documents"
    )


main = cli.command(TokenizerConfig, run, __doc__, unexpected="Name the corpus with --input {}")
if __name__ == "__main__":
    cli.run(main)
