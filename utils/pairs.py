"""Pairs: what is asked, which is given, and the answer, which is learned; and rows of them.

A row is `<|endoftext|>`, then for each message the marker of its role and its text, the answer
last, and `<|endoftext|>` to the end. All up to the marker of the answer is given: it is never
noised and carries no loss. The rest is noised, the `<|endoftext|>` behind the answer too: a canvas
is full of masks, and a model that never saw masks there cannot say where an answer ends. The loss
and the bound are of all that is noised, in nats per token of the answer, its first `<|endoftext|>`
included.
"""

import json
import os
from typing import NamedTuple

import torch

from utils import cli, texts
from utils.cli import UserError
from utils.tokenizer import MARKERS

COLUMNS = "prompt and completion, or messages"


class Pair(NamedTuple):
    prompt: tuple  # of messages, (role, text) each
    completion: str

    @property
    def question(self):
        """The last thing that is asked (str)."""
        return self.prompt[-1][1] if self.prompt else ""


def asked(question, completion=""):
    """The Pair of a user's question (str) and its answer."""
    return Pair((("user", question),), completion)


# --- from files -----------------------------------------------------------------------------------


def has_pairs(row):
    """Whether a row (dict) of a data set is of pairs."""
    return {"prompt", "completion"} <= row.keys() or "messages" in row


def in_file(path):
    """Whether a file holds pairs."""
    if not path.endswith(texts.LOCAL):
        return False
    dataset = texts.open_dataset(path)
    with texts.reading(path):
        return "text" not in (row := next(iter(dataset), {})) and has_pairs(row)


def read(path):
    """Pairs (list) of a .jsonl or .parquet file in the format of Hugging Face's TRL: rows of
    {"prompt", "completion"}, each a str or a list of messages, or of {"messages"}, of
    {"role", "content"} each. Every answer of a conversation makes a pair with what is before it."""
    if not os.path.exists(path):
        raise UserError(f"there is no file {path} of pairs")
    if not path.endswith(texts.LOCAL):
        raise UserError(f"pairs are read from .jsonl or .parquet files, and {path} is none")
    found = list(stream(texts.open_dataset(path), path))
    if not found:
        raise UserError(f"{path} has no pairs")
    return found


def stream(dataset, path):
    """Yields the Pairs of a data set (`texts.open_dataset`) whose answers are not empty."""
    with texts.reading(path):
        for number, row in enumerate(dataset, 1):
            try:
                found = of_row(row)
            except ValueError as error:
                raise UserError(f"row {number} of {path} is no pair: {error}") from None
            yield from (pair for pair in found if pair.completion.strip())


def write(path, found):
    """Write pairs (iterable) as .jsonl of prompts and completions, all or nothing; returns how
    many."""
    count = 0
    with cli.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for count, pair in enumerate(found, 1):
            said = {"prompt": pair.prompt, "completion": [("assistant", pair.completion)]}
            row = {
                name: [{"role": role, "content": text} for role, text in messages]
                for name, messages in said.items()
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not count:
            raise UserError(f"no pairs came; {path} was not written")
    return count


def of_row(row):
    """Pairs (list) of a row (dict) of a data set. ValueError where it is none."""
    if not has_pairs(row):
        raise ValueError(f"it has the columns {', '.join(row)}; expected {COLUMNS}")
    if "messages" in row:
        said = messages(row["messages"], "user")
    else:
        said = messages(row["prompt"], "user") + messages(row["completion"], "assistant")
        if said[-1][0] != "assistant":
            raise ValueError("its completion is not the assistant's")
    ends = [number for number, (role, _) in enumerate(said) if role == "assistant"]
    if not ends:
        raise ValueError("nobody answers: no message has the role assistant")
    ends = ends if "messages" in row else ends[-1:]
    return [Pair(tuple(said[:end]), said[end][1]) for end in ends]


def messages(content, role):
    """[(role, text)] of a str, which the role says, or of a list of messages."""
    if isinstance(content, str):
        return [(role, content)]
    if not isinstance(content, list) or not content:
        raise ValueError(f"expected a text or a list of messages, got {type(content).__name__}")
    for message in content:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError("a message has a role and a content")
        if message["role"] not in MARKERS:
            known = ", ".join(MARKERS)
            raise ValueError(f"a message has the role {message['role']}; known: {known}")
        if not isinstance(message["content"], str):
            raise ValueError(f"a content is {type(message['content']).__name__}, not text")
    return [(message["role"], message["content"]) for message in content]


def texts_of(pairs):
    """All that is said in pairs, for a tokenizer (list of str)."""
    return [text for pair in pairs for text in (*(t for _, t in pair.prompt), pair.completion)]


# --- rows -----------------------------------------------------------------------------------------


def beginnings(prompts, tokenizer, what="the prompt"):
    """Token ids (lists) of prompts (tuples of messages) up to the marker of the answer."""
    said = iter(tokenizer.encode([text for prompt in prompts for _, text in prompt], what))
    return [
        [tokenizer.end]
        + [i for role, _ in prompt for i in (tokenizer.roles[role], *next(said))]
        + [tokenizer.roles["assistant"]]
        for prompt in prompts
    ]


def rows_of(pairs, tokenizer, seq_len):
    """(rows (R, seq_len) long, how many pairs were left out because they and their end do not
    fit)."""
    begun = beginnings([pair.prompt for pair in pairs], tokenizer, "the corpus")
    answers = tokenizer.encode([pair.completion for pair in pairs], "the corpus")
    whole = [[*before, *after] for before, after in zip(begun, answers, strict=True)]
    fitting = [ids for ids in whole if len(ids) < seq_len]
    rows = torch.full((len(fitting), seq_len), tokenizer.end)
    for row, ids in zip(rows, fitting):
        row[: len(ids)] = torch.tensor(ids)
    return rows, len(whole) - len(fitting)


def given(rows, tokenizer):
    """What is given in rows (R, L) long: (R, L) bool."""
    markers = rows == tokenizer.roles["assistant"]
    return markers.flip(1).cumsum(1).flip(1) > 0


def answer_lengths(rows, tokenizer):
    """Tokens of the answers of rows (R, L) long, each with its end: (R,) long."""
    before = given(rows, tokenizer)
    ends = (rows == tokenizer.end) & ~before
    first = torch.where(ends.any(1), ends.int().argmax(1) + 1, rows.size(1))
    return first - before.sum(1)


def of_rows(rows, tokenizer):
    """The Pairs (list) of rows (R, L) long: what a network made of them is cut at its end."""
    role_of = {i: role for role, i in tokenizer.roles.items()}
    lengths = answer_lengths(rows, tokenizer).tolist()
    found = []
    for row, before, length in zip(rows.tolist(), given(rows, tokenizer).sum(1).tolist(), lengths):
        said = []
        for i in row[1 : before - 1]:
            if i in role_of:
                said.append((role_of[i], []))
            elif said:
                said[-1][1].append(i)
        prompt = tuple((role, tokenizer.decode(ids)) for role, ids in said)
        found.append(Pair(prompt, tokenizer.decode(row[before : before + length])))
    return found
