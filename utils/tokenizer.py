"""Tokenizers: characters or byte-level BPE, both a `tokenizers.Tokenizer` underneath, both one JSON
file.

Ids 0..V-1 are real tokens. MASK is not one of them: its id is V, and no text encodes to it. Corpora
of several documents have a real token `<|endoftext|>` between documents, corpora of pairs one in
front of what each role says; the same letters in a text are plain text.
"""

import os

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from utils import cli
from utils.cli import UserError

END = "<|endoftext|>"
MARKERS = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
DEFAULT = "artifacts/tokenizer/tokenizer.json"
BPE_READS = 50_000_000  # characters, some ten seconds of training


class Tokenizer:
    """Thin interface over a `tokenizers.Tokenizer`.

    vocab_size  V + 1: the real tokens and MASK
    mask        id of MASK, V
    end         id of `<|endoftext|>`, or None
    roles       {role: id of its marker}, of MARKERS those that it has
    """

    def __init__(self, tokenizer):
        tokenizer.encode_special_tokens = True  # a text that spells <|endoftext|> is text
        tokenizer.no_truncation()  # some files cut every text, or fill it up
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.mask = tokenizer.get_vocab_size()
        self.vocab_size = self.mask + 1
        self.end = tokenizer.token_to_id(END)
        ids = {role: tokenizer.token_to_id(marker) for role, marker in MARKERS.items()}
        self.roles = {role: i for role, i in ids.items() if i is not None}
        self._silent = {self.mask, self.end, *self.roles.values()}  # what reads as nothing
        self.is_char = isinstance(tokenizer.model, models.WordLevel)
        vocab = tokenizer.get_vocab()
        if sorted(vocab.values()) != list(range(self.mask)):
            raise UserError(f"its ids are not 0 to {self.mask - 1}, each once")
        # as they are written
        self._added = {
            i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()
        }
        if not self.is_char and not all(
            i in self._added or _BYTE.keys() >= set(t) for t, i in vocab.items()
        ):
            raise UserError(
                "it is no byte-level BPE (nor one of characters), so that the bytes of its tokens "
                "are not known"
            )
        special = {END, *MARKERS.values()}
        self._characters = vocab.keys() - special if self.is_char else None

    def encode(self, texts, what="the text"):
        """List of str -> list of lists of ids. A character that a character vocabulary lacks is a
        UserError."""
        if self.is_char:
            for text in texts:
                if unknown := set(text) - self._characters:
                    shown = " ".join(repr(c) for c in sorted(unknown)[:8])
                    raise UserError(
                        f"{what} has characters that the vocabulary of this model lacks: {shown}; "
                        f"it knows {''.join(sorted(self._characters))!r}"
                    )
        try:
            return [
                encoding.ids
                for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ]
        except (TypeError, UnicodeEncodeError):
            raise UserError(f"{what} is not valid Unicode text") from None
        except Exception as error:
            # `tokenizers` raises plain Exception; the file may be a stranger's
            raise UserError(f"the tokenizer cannot encode {what}: {cli.reason(error)}") from None

    def decode(self, ids):
        """Real ids (list of int) -> str; `<|endoftext|>` and markers read as nothing."""
        ids = [i for i in ids if i not in self._silent]
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def num_bytes(self, ids):
        """UTF-8 bytes that the ids stand for; exact also where a window cuts a character in two."""
        return sum(len(raw) for raw in map(self._bytes, ids))

    def _bytes(self, i):
        if i in self._silent:
            return b""
        token = self.tokenizer.id_to_token(i)
        return (
            token.encode() if self.is_char or i in self._added else bytes(_BYTE[c] for c in token)
        )

    def pieces(self, ids):
        """One str per id, together the text: for pictures in which every token has its place.

        A BPE token may end inside a character of several bytes: the character then belongs to its
        first token, and what never becomes a character (a MASK stands in between) is shown as
        \\x... . MASK and `<|endoftext|>` are "", and markers a line break between what is said.
        """
        raw = list(map(self._bytes, ids))
        out, position = [""] * len(ids), 0
        while position < len(ids):
            start = position
            out[start], position = _whole_characters(raw, start)
            if ids[start] in self.roles.values() and any(out[:start]):
                out[start] = "\n"
        return out

    def to_json(self):
        return self.tokenizer.to_str()


def _whole_characters(raw, start):
    """(str of the token at `start` of raw, a list of the tokens' bytes, and of those after it while
    the bytes end inside a character; place of the token that follows)."""
    text = b""
    for place in range(start, len(raw)):
        text += raw[place]
        try:
            return text.decode(), place + 1
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data" or not raw[place]:
                break
    return raw[start].decode(errors="backslashreplace"), start + 1


def _byte_alphabet():
    """Character -> byte of the byte-level alphabet (GPT-2): printable bytes stand for
    themselves."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE = _byte_alphabet()


def train_char(texts, documents):
    """A token for every character of `texts` (iterable of str), sorted; `documents` adds
    `<|endoftext|>`."""
    characters = sorted(set().union(*map(set, texts)))
    vocab = {c: i for i, c in enumerate(characters + [END] * documents)}
    tokenizer = Backend(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return Tokenizer(tokenizer)


def spread(texts):
    """Yields texts (list of str), or where they have more than BPE_READS characters together so
    many of them, evenly spread: whole texts, and pieces of long ones."""
    total = sum(map(len, texts))
    if total <= BPE_READS:
        yield from texts
        return
    size, seen, taken = max(1, BPE_READS // 100), 0, 0
    for text in texts:
        for start in range(0, len(text), size):
            length = min(size, len(text) - start)
            if taken * total <= BPE_READS * seen:
                yield text[start : start + length]
                taken += length
            seen += length


def train_bpe(texts, vocab_size, min_frequency=2):
    """Byte-level BPE from `texts` (list of str) with vocab_size - 1 real tokens, `<|endoftext|>`
    among them.

    All 256 bytes are in the alphabet, so every string round-trips. A small text may give fewer
    tokens. Of very long texts `spread` chooses what is read.
    """
    if vocab_size < 258:
        raise UserError(f"vocab_size={vocab_size} is too small: 256 bytes, {END} and MASK need 258")
    tokenizer = Backend(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        spread(texts),
        trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=min_frequency,
            special_tokens=[END],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return Tokenizer(tokenizer)


def with_roles(tokenizer):
    """The Tokenizer with `<|endoftext|>` and all MARKERS: those that it lacks come after its other
    tokens."""
    missing = [END] if tokenizer.end is None else []
    missing += [marker for role, marker in MARKERS.items() if role not in tokenizer.roles]
    if not missing:
        return tokenizer
    backend = Backend.from_str(tokenizer.to_json())
    backend.add_special_tokens(missing)
    return Tokenizer(backend)


def from_json(text):
    """Tokenizer of what `Tokenizer.to_json` gave; anything else is a UserError."""
    try:
        return Tokenizer(Backend.from_str(text))
    except Exception as error:  # `tokenizers` raises plain Exception
        raise UserError(f"no tokenizer that this program can use: {cli.reason(error)}") from None


def load(path):
    """Tokenizer file -> Tokenizer."""
    if not os.path.exists(path):
        raise UserError(
            f"there is no tokenizer {path}; make it with: python scripts/train_tokenizer.py "
            f"--input YOUR.txt --output {path}"
        )
    try:
        return from_json(open(path, encoding="utf-8").read())
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(f"{path}: {error}") from None


def save(tokenizer, path):
    """Write the tokenizer file; an unwritable path is a UserError."""
    with cli.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(tokenizer.to_json())
