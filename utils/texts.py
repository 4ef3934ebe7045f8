"""Documents: read from text files and datasets, streamed, downloaded, mended, written, and parted
for training.

A prepared text file separates documents by a line that holds only `<|endoftext|>`. Documents stay
whole: each goes to training or to the held-out part by a hash of its text, so the same document is
never in both, and the tokenizer, which is trained on the training part only, never sees held-out
text. (An alphabet of characters is that of the whole corpus, as is usual: it has nothing to learn
from frequencies.)
"""

import contextlib
import hashlib
import http.client
import io
import os
import re
import zipfile
from itertools import chain, islice

from utils import cli, runtime
from utils import tokenizer as tokenizers
from utils.cli import UserError, reason

HELD_OUT = 0.1  # share of the documents, or of the text of a single one
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
STORIES = "roneneldan/TinyStories"
# enwik8 and text8, the first 100 MB of Wikipedia as it was in 2006
BENCHMARK = "http://mattmahoney.net/dc/{}.zip"
DOWNLOADS = ("shakespeare", "text8", "enwik8")
LOCAL = (".jsonl", ".json", ".parquet")


def read_documents(path, column="text"):
    """Documents (list of str) of a local .txt, .jsonl or .parquet file; `column` of the latter
    two."""
    if not os.path.exists(path):
        raise UserError(
            f"there is no file {path}; scripts/data.py makes corpora, --data takes any .txt, "
            ".jsonl or .parquet file"
        )
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
    """Turn the errors of `datasets`, of which there are dozens of kinds, its own and its backends',
    into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # see above
        if name.endswith(LOCAL):
            raise UserError(f"{name} cannot be read: {reason(error)}") from None
        raise UserError(
            f"cannot stream {name} from the Hugging Face hub ({reason(error)}); without a network "
            "give a local file: --dataset FILE.txt, .jsonl or .parquet, or --dataset tales"
        ) from None


def open_dataset(name, split="train", config=None):
    """A Hugging Face dataset, or a local .jsonl or .parquet file, as a `datasets.IterableDataset`:
    never downloaded or held in memory as a whole."""
    import datasets  # here, because it takes seconds to import and most runs do not need it

    with reading(name):
        if name.endswith(LOCAL):
            kind = "parquet" if name.endswith(".parquet") else "json"
            return datasets.load_dataset(kind, data_files=name, split="train", streaming=True)
        print(f"looking for {name} on the Hugging Face hub")
        runtime.quiet_hub()
        return datasets.load_dataset(name, config, split=split, streaming=True)


def documents_of(dataset, name, column="text"):
    """Documents (iterator of str) in the column of an `open_dataset`."""
    with reading(name):
        for row in dataset:
            if column not in row:
                raise UserError(
                    f"{name} has no column {column}, but {', '.join(row)}; scripts/data.py chooses "
                    "one with --text-column"
                )
            if row[column] is None:
                continue
            if not isinstance(row[column], str):
                raise UserError(
                    f"the column {column} of {name} holds {type(row[column]).__name__}, not text"
                )
            yield row[column]


def stream_dataset(
    name, split="train", config=None, column="text", seed=None, shuffle_buffer=10_000
):
    """Documents (iterator of str) of a dataset; with a seed, shuffled through a buffer of
    `shuffle_buffer`."""
    dataset = open_dataset(name, split, config)
    if seed is not None:
        dataset = dataset.shuffle(seed=seed, buffer_size=shuffle_buffer)
    yield from documents_of(dataset, name, column)


_TITLE = re.compile(r" = (?!= ).* = ?")


def articles(lines):
    """The lines (iterable of str) of a WikiText file as articles (iterator of str): each begins
    with its title ` = Title = `, between empty lines. Together they have all lines, empty ones
    too."""
    article, before = [], ""
    lines = chain(lines, [None])
    line = next(lines)
    for following in lines:
        title = _TITLE.fullmatch(line) and not before.strip() and not (following or "").strip()
        if title and any(map(str.strip, article)):
            yield "\n".join(article)
            article = []
        article.append(line)
        before, line = line, following
    if line is not None:
        article.append(line)
    if article:
        yield "\n".join(article)


def download(name):
    """The text (str) of shakespeare (1,115,394 characters), enwik8 or text8."""
    import urllib.request

    url = SHAKESPEARE if name == "shakespeare" else BENCHMARK.format(name)
    print(f"fetching {name} from {url}")
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
        return (
            content if name == "shakespeare" else zipfile.ZipFile(io.BytesIO(content)).read(name)
        ).decode()
    except (
        OSError,
        http.client.HTTPException,
        zipfile.BadZipFile,
        KeyError,
        UnicodeDecodeError,
    ) as error:
        raise UserError(
            f"cannot fetch {name} ({error}); without a network put a copy at data/{name}.txt, or "
            "train on the built-in tales: python train.py tales"
        ) from None


_TAIL = {chr(b): b for b in range(0x80, 0xC0)} | {
    bytes([b]).decode("cp1252"): b
    for b in range(0x80, 0xC0)
    if b not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
}
_MOJIBAKE = re.compile(f"[\u00c2-\u00f4][{re.escape(''.join(_TAIL))}]{{1,3}}")


def repair_mojibake(text):
    """UTF-8 that somebody read as Windows-1252, put right: the three characters that a quotation
    mark became are one again. Only sequences that are valid UTF-8 change, so real quotation marks
    and accents stay as they are."""

    def repair(match):
        found = match.group()
        for end in range(len(found), 1, -1):
            try:
                return (
                    bytes([ord(found[0])]) + bytes(_TAIL[c] for c in found[1:end])
                ).decode() + found[end:]
            except UnicodeDecodeError:
                continue
        # its last byte has no cp1252 letter
        return "\u201d" + found[2:] if found[:2] == "\u00e2\u20ac" else found

    return _MOJIBAKE.sub(repair, text)


def write_documents(path, documents, separator=None):
    """Write documents (iterable of str) as a prepared text file, all or nothing; returns how
    many."""
    separator, count = separator or f"\n{tokenizers.END}\n", 0
    with cli.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for document in documents:
            if document and not document.isspace():
                file.write(separator * bool(count) + document)
                count += 1
        if not count:
            raise UserError(f"no documents came; {path} was not written")
    return count


def prepare(path):
    """Make the missing corpus of a preset; any other missing file is left to `read_documents`."""
    if path in (f"data/{name}.txt" for name in DOWNLOADS):
        write_documents(path, [download(os.path.basename(path).removesuffix(".txt"))])
    elif path.endswith(".bin"):
        raise UserError(
            f"there is no {path}; make it with: python scripts/data.py --dataset fineweb-edu "
            f"--tokens 10B --tokenizer artifacts/tokenizer/fineweb.json --output {path} (README, "
            "Several GPUs)"
        )
    elif path == "data/stories.txt":
        print(f"streaming 10,000 stories of {STORIES} from the Hugging Face hub to {path}")
        write_documents(
            path, map(repair_mojibake, islice(stream_dataset(STORIES, seed=1337), 10_000))
        )


def split_documents(text):
    """The text of a prepared file -> its documents."""
    parts = re.split(rf"(?m)^{re.escape(tokenizers.END)}$", text)
    return [
        part.removeprefix("\n" * (i > 0)).removesuffix("\n" * (i < len(parts) - 1))
        for i, part in enumerate(parts)
    ]


def is_held_out(document, share=HELD_OUT):
    """Whether `document` belongs to the held-out part: a function of its text alone."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") < share * 2**64


def split(documents, key=None):
    """(training, held-out) documents. A single document is cut at its last tenth; of several, at
    least one each. key: function from another thing than a document to the text that decides."""
    if len(documents) == 1 and key:
        raise UserError("the corpus is a single pair, and one has to be held out; use more")
    if len(documents) == 1:
        cut = int(len(documents[0]) * (1 - HELD_OUT))
        if not cut:
            raise UserError(
                "the corpus is a single character, too short to hold anything out; use more text"
            )
        return [documents[0][:cut]], [documents[0][cut:]]
    train, held_out = [], []
    for document in documents:
        text = key(document) if key else document
        (held_out if is_held_out(text) else train).append(document)
    for part, other in ((train, held_out), (held_out, train)):
        if not part:  # a handful of documents may fall on one side
            part.append(other.pop())
    return train, held_out
