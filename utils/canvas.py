"""Canvases: rows of ids, MASK where the model generates. Prompted, infilled and unconditional
samples differ only in where the MASKs are."""

import re

from config import LONGEST
from utils import pairs, runtime, sudoku
from utils import tokenizer as tokenizers
from utils.cli import UserError, reason

MOST_TOKENS = 2**24  # of all texts together: what is kept of each token is some 100 bytes

# an escape, a hole, or a bracket that is neither
HOLE = re.compile(r"\\([\[\]\\])|\[(?:(\d+)|_+)\]|(\[[^\]]*\]?)")
GUIDE_HOLE = 5  # tokens of [___], the hole of the "Let's build a diffusion LM" guide


def parse_infill(template):
    """'Tom [8] a [3] boat.' -> ['Tom ', 8, ' a ', 3, ' boat.']. [___] is a hole of five, \\[, \\]
    and \\\\ are plain."""
    parts, plain, position = [], "", 0
    for match in HOLE.finditer(template):
        plain += template[position : match.start()]
        position = match.end()
        escaped, size, wrong = match.groups()
        if wrong:
            raise UserError(
                f"--infill: {wrong} is no hole; write [8] for a hole of 8 tokens, \\[ for a plain "
                "bracket"
            )
        if escaped:
            plain += escaped
            continue
        if size and len(size.lstrip("0")) > len(str(LONGEST)):
            raise UserError(
                f"--infill: a hole of {size[:20]} tokens; a text has at most {LONGEST:,}"
            )
        parts += [plain, int(size[-len(str(LONGEST)) :]) if size else GUIDE_HOLE]
        plain = ""
    parts.append(plain + template[position:])
    if not any(isinstance(part, int) and part for part in parts):
        raise UserError(
            "--infill has no hole; write [8] where 8 tokens are to be filled in, as in 'Tom [8] a "
            "boat.'"
        )
    return [part for part in parts if part]


def build(tokenizer, parts, window, prompt=None):
    """One row (list of ids) from parts: str is given, int a number of MASKs, None MASKs to the end
    of the window.

    A model of documents starts with a given `<|endoftext|>`: a document begins here. One of pairs
    starts with the prompt, a tuple of messages (role, text). A token of BPE carries the space in
    front of a word, so the space before a hole is left to the hole.
    """
    row = [] if tokenizer.end is None else [tokenizer.end]
    if prompt is not None:
        [row] = pairs.beginnings([prompt], tokenizer)
    ids = iter(
        tokenizer.encode(
            [
                part.rstrip(" ") if not tokenizer.is_char and i + 1 < len(parts) else part
                for i, part in enumerate(parts)
                if isinstance(part, str)
            ],
            "the prompt",
        )
    )
    pieces = [next(ids) if isinstance(part, str) else part for part in parts]
    asked = len(row) + sum(
        len(piece) if isinstance(piece, list) else piece or 0 for piece in pieces
    )
    if asked > LONGEST:
        raise UserError(
            f"the text would have {asked:,} tokens, more than {LONGEST:,}; ask for fewer"
        )
    room = window - asked
    if None in pieces and room < 1:
        raise UserError(
            f"the prompt takes {window - room} of the window's {window} tokens, which leaves no "
            "room to write: shorten it, or say with --gen-len how many tokens to generate beyond "
            "the window"
        )
    for piece in pieces:
        row += (
            piece
            if isinstance(piece, list)
            else [tokenizer.mask] * (room if piece is None else piece)
        )
    return row


def start(tokenizer, row):
    """Where the text of a row (list of ids) begins: after the `<|endoftext|>` that it begins with;
    of a pair after the question."""
    marker = tokenizer.roles.get("assistant")
    if marker is not None and marker in row:
        return len(row) - row[::-1].index(marker)
    return int(row[:1] == [tokenizer.end])


def question(tokenizer, row):
    """What is asked in a row (list of ids) of a pair, and a line break (str); "" of another."""
    begin = start(tokenizer, row)
    return "".join(tokenizer.pieces(row[:begin])) if begin > 1 else ""


def end(tokenizer, ids, blank=None):
    """Where the text of a sampled row (list of ids) ends: at the first `<|endoftext|>` that was
    generated after all given text. blank is the canvas (list of ids) that the row began as; None is
    an unconditional one, or a pair's."""
    given = [i for i, token in enumerate(blank or ()) if token != tokenizer.mask]
    after = given[-1] + 1 if given else max(1, start(tokenizer, ids))
    return ids.index(tokenizer.end, after) if tokenizer.end in ids[after:] else len(ids)


def finished(tokenizer, ids, blank=None, stop=True):
    """Text (str) of a sampled row (list of ids): from its `start` to its `end`; with stop=False all
    of it, each `<|endoftext|>` as in a prepared file, on a line of its own."""
    if tokenizer.end is None:
        return tokenizer.decode(ids)
    if stop:
        ids = ids[: end(tokenizer, ids, blank)]
    parts = [[]]
    for token in ids[start(tokenizer, blank or ids) :]:
        if token == tokenizer.end:
            parts.append([])
        else:
            parts[-1].append(token)
    return f"\n{tokenizers.END}\n".join(map(tokenizer.decode, parts))


def documents(tokenizer, ids, rows):
    """Texts (list of str) of an unconditional sample: one where rows (of the config) is "document",
    and where it is "stream" all that stand whole between two `<|endoftext|>`."""
    if rows == "document":
        return [finished(tokenizer, ids)]
    ends = [i for i, token in enumerate(ids) if token == tokenizer.end]
    return [tokenizer.decode(ids[start + 1 : end]) for start, end in zip(ends, ends[1:])]


# --- what a command line of inference.py asks for -------------------------------------------------


def rows_of(how, family, tokenizer):
    """Rows to fill: list of (canvas, a list of ids; seed), as how (SampleConfig) has prompts, holes
    and numbers of samples."""
    window = family.cfg.seq_len
    if how.draft:
        rows = [blank_of_draft(how, family.cfg, tokenizer)]
    else:
        asked = asked_for(how, family.cfg)
        rows = [build(tokenizer, parts, window, prompt) for prompt, parts in asked]
    if family.cfg.rows == "pair" and (longest := max(map(len, rows))) > window:
        raise UserError(
            f"question and answer would have {longest:,} tokens, and the window has {window:,}; "
            "make one of them shorter"
        )
    if how.min_len > (least := min(row.count(tokenizer.mask) for row in rows)):
        raise UserError(
            f"min_len={how.min_len}, but there are only {least} tokens to generate"
            + ("" if how.infill or how.puzzle else "; say with --gen-len how many")
        )
    if family.block_len and any(given_after_a_hole(row, tokenizer.mask) for row in rows):
        raise UserError(
            "this model generates from left to right and sees nothing of what comes after; give a "
            "--prompt, without --suffix, --infill and --puzzle, or train a masked model "
            "(--objective masked --block_len 0)"
        )
    if sum(map(len, rows)) * how.num_samples > MOST_TOKENS:
        raise UserError(
            f"{len(rows) * how.num_samples:,} texts of up to {max(map(len, rows)):,} tokens are "
            f"more than {MOST_TOKENS:,} tokens together; ask for fewer at a time"
        )
    return [(row, how.seed + i) for row in rows for i in range(how.num_samples)]


def drafted(how, cfg, tokenizer):
    """The row (list of ids) of the text of --draft, as training has it."""
    if cfg.rows == "pair":
        raise UserError("--draft is for a model of texts; ask this one with --prompt")
    row = build(tokenizer, [how.draft], cfg.seq_len)
    if len(row) + (cfg.rows == "document") > cfg.seq_len:
        raise UserError(
            f"the draft takes {len(row):,} tokens and its end one, and the window has "
            f"{cfg.seq_len:,}; shorten it"
        )
    filled = cfg.seq_len - len(row) if cfg.rows == "document" else 0
    return row + [tokenizer.end] * filled


def blank_of_draft(how, cfg, tokenizer):
    """Its canvas: all but what is given in every row may be changed."""
    row = drafted(how, cfg, tokenizer)
    given = start(tokenizer, row)
    return row[:given] + [tokenizer.mask] * (len(row) - given)


def asked_for(how, cfg):
    """[(prompt of a pair or None, parts)], what `build` makes canvases of for a model of cfg."""
    prompts = read_prompts(how.prompt_file) if how.prompt_file else [how.prompt]
    rest = [part for part in (how.gen_len, how.suffix) if part != ""]
    if cfg.rows == "pair":
        if how.infill:
            raise UserError("this model answers questions; give one with --prompt, not --infill")
        if how.puzzle:
            prompts = [puzzle_of(how.puzzle, cfg)]
        return [(pairs.asked(prompt).prompt, rest) for prompt in prompts]
    if how.infill or how.puzzle:
        template = how.infill or sudoku_template(puzzle_of(how.puzzle, cfg))
        return [(None, parse_infill(template))]
    return [(None, [prompt, *rest] if prompt else rest) for prompt in prompts]


def puzzle_of(puzzle, cfg):
    """The text of a Sudoku (str), checked, for a model of such grids."""
    try:
        cells, side = sudoku.parse(puzzle)
    except ValueError as error:
        raise UserError(f"--puzzle has {error}") from None
    if None not in cells:
        raise UserError("--puzzle has no hole; write a dot for each cell to be filled")
    if not sudoku.solve(cells, side, limit=1).grids:
        raise UserError("--puzzle has no solution")
    if not cfg.data.startswith(f"sudoku{side}"):
        raise UserError(
            f"--puzzle is of {side} x {side}, and this model was trained on {cfg.data}; train one "
            f"with: python train.py --data sudoku{side}"
        )
    return sudoku.to_text(cells, side)


def sudoku_template(text):
    """The template (str) of the text of a Sudoku, with a hole of one token for each dot."""
    return text.replace(sudoku.HOLE, "[1]")


def read_prompts(path):
    """The lines of a file that are not blank."""
    try:
        with open(path, encoding="utf-8") as file:
            prompts = [line for line in file.read().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts of {path}: {reason(error)}") from None
    if not prompts:
        raise UserError(f"{path} is empty; write a prompt on each line")
    return prompts


def given_after_a_hole(row, mask):
    """Whether a row (list of ids) has a given token after a MASK."""
    return mask in row and any(token != mask for token in row[row.index(mask) :])


def batches(rows, family, vocabulary, device):
    """Indices (lists) of the rows, a list of (canvas, seed), that are generated together: those of
    a length, as many as fit."""
    for length in dict.fromkeys(len(row) for row, _ in rows):
        members = [i for i, (row, _) in enumerate(rows) if len(row) == length]
        size = runtime.rows_that_fit(family, vocabulary, length, device)
        yield from (members[start : start + size] for start in range(0, len(members), size))
