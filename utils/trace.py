"""Text appearing out of masks: the states of a sampler -> frames -> MP4, GIF, a page of HTML, or the terminal.

In pictures every token keeps its place from first to last, because the layout is that of the finished text. States
are told apart by shape as well as by colour (Okabe-Ito's colours, which colour-blind readers can tell apart):
a hidden token is a hollow box, a fresh one bold on a filled box, a re-masked one a crossed box, the given text is
underlined. What the model has written stands on a tint: the paler, the surer it was.
"""
import functools
import json
import math
import os
import shutil
import sys
import time
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from utils import cli
from utils.cli import UserError

WIDTH, HEIGHT, MARGIN = 1280, 720, 48
TEXT_TOP, TEXT_BOTTOM = 112, 580  # the text's part of the picture
PAPER, INK, FAINT, GIVEN = "#fbfaf7", "#1d1d1f", "#a9a59c", "#0072b2"
FRESH, REMASKED, CURVE, SURE = "#e69f00", "#cc79a7", "#56b4e9", "#d55e00"
UNSURE = (140, 190, 235)  # tint of a token of confidence 0; at 1 there is none
HOLD_SECONDS, PAGE_SECONDS = 3, 2
MOST_STATES = 2**24  # of tokens, over all frames of a trace


class Frame(NamedTuple):
    number: int       # of the step, from 1; 0 is the canvas
    ids: list         # L ids of one row
    fresh: list       # L bools
    remasked: list    # L bools
    nfe: int          # network evaluations of this row so far
    confidence: list  # L floats, the largest probability of each position when it was last computed
    top: list = None  # L lists of (token, probability), likeliest first, as last computed


def check_states(states, tokens, every, alternatives):
    """Complain where a trace of every so many of the states, of so many tokens, with alternatives or without, would not fit into
    memory: a token takes some 90 bytes in a state, and 600 with them."""
    most = MOST_STATES // (8 if alternatives else 1)
    if (states // every) * tokens > most:
        raise UserError(f"up to {states // every:,} states of {tokens:,} tokens are too many for a trace; give --trace-every "
                        f"{-(-states * tokens // most)}")


def record(steps, canvas, mask, every=1):
    """Wrap the stream of `sampling.Step`s: returns (frames, iterator that yields the same steps).

    frames fills as the iterator is consumed: row 0 of `canvas`, then of every `every`-th step, and of the last, unless
    nothing changed in it. What became fresh or was hidden in steps between is marked in the next frame.
    """
    blank = [False] * canvas.size(1)
    frames = [Frame(0, canvas[0].tolist(), blank, blank, 0, (canvas[0] != mask).float().tolist())]

    def watch():
        fresh = remasked = None
        for number, step in enumerate(steps, 1):
            fresh = step.fresh[0] if fresh is None else fresh & ~step.remasked[0] | step.fresh[0]
            remasked = step.remasked[0] if remasked is None else remasked & ~step.fresh[0] | step.remasked[0]
            if number % every == 0 and (fresh | remasked).any():
                frames.append(_frame(number, step, fresh, remasked))
                fresh = remasked = None
            yield step
        if fresh is not None and (fresh | remasked).any():
            frames.append(_frame(number, step, fresh, remasked))

    return frames, watch()


def _frame(number, step, fresh, remasked):
    top = None
    if step.top is not None:
        tokens, p = (part[0].tolist() for part in step.top)
        top = [list(zip(*pair)) if pair[1][0] > 0 else [] for pair in zip(tokens, p)]  # [] was never computed
    return Frame(number, step.ids[0].tolist(), fresh.tolist(), remasked.tolist(), int(step.row_nfe[0]),
                 step.confidence[0].tolist(), top)


# --- fonts and characters ---------------------------------------------------------------------------------------


@functools.cache
def _font_file(style=""):
    import matplotlib  # ships DejaVu, so that no font has to be installed
    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSansMono{style}.ttf")


@functools.cache
def font(size, style=""):
    return ImageFont.truetype(_font_file(style), size)


@functools.cache
def _known_characters():
    from matplotlib import font_manager
    return frozenset(font_manager.get_font(_font_file()).get_charmap())


def printable(piece):
    """The text of a token as it is drawn: a line break as an arrow, what the font lacks escaped (never a box)."""
    known = _known_characters()
    return "".join("↵" if c == "\n" else "→" if c == "\t" else
                   c if ord(c) in known and (c == " " or c.isprintable()) else
                   c.encode("unicode_escape").decode() for c in piece)


# --- layout -----------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    places: list   # (line, column) of each token, over all pages
    cells: list    # characters that each token takes, over all frames
    columns: int   # characters in a line
    lines: int     # lines on a page
    pages: int
    size: int      # font size in pixels


def _place(cells, pieces, columns):
    """(line, column) of each token; one that does not fit on the line goes to the next, whole unless longer than it.

    The space that a wrapped word begins with hangs in the margin (column -1), so that lines start flush.
    """
    places, line, column = [], 0, 0
    for width, piece in zip(cells, pieces):
        if column > 0 and column + width > columns:
            line, column = line + 1, -1 if piece.startswith(" ") else 0
        places.append((line, column))
        line, column = line + (column + width - 1) // columns, (column + width - 1) % columns + 1
        if piece.endswith("\n"):
            line, column = line + 1, 0
    return places


def layout(pieces_of_frames):
    """Layout for the pieces (str) of every frame: the largest type in which the text fits, or pages of the smallest.

    A token's room is the widest that it is in any frame, at least one cell, so that nothing moves.
    """
    cells = [max(1, *(len(printable(piece)) for piece in column)) for column in zip(*pieces_of_frames)]
    for size in (36, 32, 28, 24, 22, 20):
        columns = int((WIDTH - 2 * MARGIN) / font(size).getlength("m"))
        lines = int((TEXT_BOTTOM - TEXT_TOP) / (1.5 * size))
        places = _place(cells, pieces_of_frames[-1], columns)
        used = places[-1][0] + 1 + (cells[-1] - 1) // columns
        if used <= lines:
            break
    return Layout(places, cells, columns, lines, math.ceil(used / lines), size)


# --- drawing ----------------------------------------------------------------------------------------------------


def draw(frame, pieces, plan, page, given, counts, sure, number, title):
    """One picture (PIL.Image): the text in its states, the title line, the number of masks and its timeline.

    pieces  text of each token in this frame, "" where it is a MASK    given  L bools: what the user gave
    counts  number of masks in each frame                              number  index of this frame
    sure    mean confidence of what is written, in each frame (None: nothing yet)
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen = ImageDraw.Draw(image)
    cell, line_height = font(plan.size).getlength("m"), 1.5 * plan.size
    for i, (piece, (first, column)) in enumerate(zip(pieces, plan.places)):
        text = None if piece is None else printable(piece).ljust(plan.cells[i])
        for part in range(0, plan.cells[i], plan.columns):  # one, unless the token is longer than a line
            line = first + part // plan.columns
            if line // plan.lines == page:
                x, y = MARGIN + column * cell, TEXT_TOP + line % plan.lines * line_height
                width = min(plan.cells[i] - part, plan.columns) * cell
                box = (x + 1, y + 1, x + max(width - 2, 4), y + 1.25 * plan.size)
                shown = text and text[part:part + plan.columns].rstrip()
                _draw_token(pen, shown, box, plan.size, given[i], frame.fresh[i], frame.remasked[i],
                            frame.confidence[i])
    _draw_header(pen, title, frame, counts, number, page, plan.pages)
    _draw_timeline(pen, counts, sure, number)
    _draw_legend(pen, any(given))
    return image


def tint(confidence):
    """Colour (r, g, b) of the paper behind a token: the surer the model was, the paler."""
    paper = [int(PAPER[i:i + 2], 16) for i in (1, 3, 5)]
    return tuple(round(c * confidence + u * (1 - confidence)) for c, u in zip(paper, UNSURE))


def _draw_token(pen, text, box, size, given, fresh, remasked, confidence):
    """A token's text in its box (x0, y0, x1, y1), in the style of its state; None is a MASK."""
    x0, y0, x1, y1 = box
    if text is None:
        pen.rounded_rectangle((x0, y0 + 3, x1, y1 - 1), 4, outline=REMASKED if remasked else FAINT,
                              width=2 if remasked else 1)
        if remasked:
            pen.line((x0 + 3, y1 - 4, x1 - 3, y0 + 6), fill=REMASKED, width=2)
        return
    if fresh:
        pen.rounded_rectangle(box, 4, fill=FRESH)
    elif not given:
        pen.rounded_rectangle(box, 4, fill=tint(confidence))
    mark = not text.strip("↵→¶")  # a line break or an end of text, not something to read
    pen.text((x0 - 1, y0), text, font=font(size, "-Bold" if fresh else ""),
             fill=INK if fresh else FAINT if mark else GIVEN if given else INK)
    if given and not mark:
        pen.line((x0, y1, x1, y1), fill=GIVEN, width=1)


def _draw_header(pen, title, frame, counts, number, page, pages):
    pen.text((MARGIN, 28), title, font=font(22, "-Bold"), fill=INK)
    left = counts[number]
    status = f"evaluation {frame.nfe}   {left} mask{'s' * (left != 1)} left of {counts[0]}"
    pen.text((MARGIN, 62), status + (f"   page {page + 1} of {pages}" if pages > 1 else ""), font=font(20), fill=INK)


def _draw_timeline(pen, counts, sure, number):
    """Masks over the frames, a faint curve for what comes, filled up to now; and mean confidence, a dotted curve."""
    left, right, top, bottom = MARGIN, WIDTH - MARGIN, 604, 662
    x = lambda i: left + (right - left) * i / max(1, len(counts) - 1)
    y = lambda share: bottom - (bottom - top) * share
    points = [(x(i), y(count / max(1, counts[0]))) for i, count in enumerate(counts)]
    if number:
        pen.polygon([(left, bottom), *points[: number + 1], (x(number), bottom)], fill=CURVE)
    pen.line(points, fill=FAINT, width=2)
    pen.line((left, bottom, right, bottom), fill=FAINT, width=1)
    dots = [(x(i), y(share)) for i, share in enumerate(sure[: number + 1]) if share is not None]
    for px, py in dots[::max(1, len(dots) // 100)]:
        pen.ellipse((px - 2, py - 2, px + 2, py + 2), fill=SURE)
    pen.line((x(number), top - 4, x(number), bottom + 4), fill=INK, width=2)


def _draw_legend(pen, prompted):
    x, y, size = MARGIN, 680, 16
    marks = [("hidden", None, False, False, False), ("fresh", "a", False, True, False),
             ("settled", "a", False, False, False), ("unsure", "a", False, False, False),
             ("masked again", None, False, False, True)]
    marks += [("given", "a", True, False, False)] if prompted else []
    for name, text, given, fresh, remasked in marks:
        _draw_token(pen, text, (x, y, x + 12, y + 20), size, given, fresh, remasked, 0.3 if name == "unsure" else 1.0)
        pen.text((x + 20, y), name, font=font(size), fill=INK)
        x += 20 + font(size).getlength(name) + 28
    pen.text((WIDTH - MARGIN, y), "area: masks left   dots: mean confidence", font=font(size), fill=INK, anchor="ra")


def pictures(frames, text, title):
    """Yield (PIL.Image, seconds or None) for recorded `frames`: None is the normal time, the last picture is held.

    text is the tokenizer (utils.tokenizer.Text). A text of several pages is shown on the page where it is being
    written, and page by page at the end.
    """
    mask = text.mask
    shown = lambda ids: [None if i == mask else "¶" if i == text.end else piece
                         for i, piece in zip(ids, text.pieces(ids))]
    pieces = [shown(frame.ids) for frame in frames]
    plan = layout([[piece or "" for piece in column] for column in pieces])
    given = [i not in (mask, text.end) for i in frames[0].ids]
    counts = [frame.ids.count(mask) for frame in frames]
    sure = []
    for frame in frames:
        written = [c for i, c, first in zip(frame.ids, frame.confidence, frames[0].ids) if i != mask and first == mask]
        sure.append(sum(written) / len(written) if written else None)
    page = 0
    for number, frame in enumerate(frames):
        on_pages = [line // plan.lines for (line, _), fresh in zip(plan.places, frame.fresh) if fresh]
        if on_pages and page not in on_pages:
            page = on_pages[0]
        last = number == len(frames) - 1
        for page in range(plan.pages) if last else (page,):
            image = draw(frame, pieces[number], plan, page, given, counts, sure, number, title)
            yield image, (HOLD_SECONDS if plan.pages == 1 else PAGE_SECONDS) if last else None


# --- the terminal -----------------------------------------------------------------------------------------------


def live(steps, text, given, frame_ms=0, out=None):
    """Wrap the stream of `sampling.Step`s: shows row 0 in the terminal `out` after each, and yields the same steps.

    given (L bools) is what the user wrote. Not a terminal: shows nothing. A terminal that cannot move its cursor gets a
    line a step. Without colour (NO_COLOR), states are told apart by weight, underline and reversal alone. The text is
    drawn on the alternate screen, which leaves no trace, also after Ctrl-C.
    """
    out = out or sys.stdout
    if not out.isatty():
        yield from steps
        return
    plain = os.environ.get("TERM", "dumb") == "dumb"
    styles = STYLES if "NO_COLOR" not in os.environ else STYLES_WITHOUT_COLOUR
    full, empty = "█░" if (getattr(out, "encoding", "") or "").lower().startswith("utf") else "#_"
    total = None
    try:
        if not plain:
            out.write("\x1b[?1049h\x1b[?25l")
        for number, step in enumerate(steps, 1):
            if not (step.fresh[0] | step.remasked[0]).any():  # another row's step
                yield step
                continue
            started, left = time.perf_counter(), int(step.masked[0].sum())
            total = total or left + int(step.fresh[0].sum())
            noise = 0.0 if left else float(step.t[0])  # of uniform noise, which has no masks
            status = f"step {number}, {int(step.row_nfe[0])} evaluations, " + (
                f"noise level {noise:.2f}" if noise else f"{left} of {total} masks left")
            if plain:
                out.write(status + "\n")
            else:
                columns, lines = shutil.get_terminal_size()
                done = int(20 * (1 - noise)) if noise else 20 * (total - left) // max(1, total)
                head = [f"{status}  {full * done}{empty * (20 - done)}"[:columns]]
                if sum(map(len, styles)) + 2 * len(styles) <= columns:
                    head.append("  ".join(f"\x1b[{code}m{state}\x1b[0m" for state, code in styles.items()))
                shown = _terminal_lines(step, text, given, columns, empty, styles)
                out.write("\x1b[H\x1b[2J" + "\n".join([*head, "", *shown[-max(1, lines - len(head) - 2):]]))
            out.flush()
            yield step
            time.sleep(max(0.0, frame_ms / 1000 - (time.perf_counter() - started)))
    finally:
        if not plain:
            out.write("\x1b[0m\x1b[?25h\x1b[?1049l")
            out.flush()


STYLES = {"fresh": "1;30;43", "unsure": "36", "hidden again": "35", "given": "4;34"}  # state -> ANSI code
STYLES_WITHOUT_COLOUR = {"fresh": "1", "unsure": "2", "hidden again": "7", "given": "4"}
UNSURE_BELOW = 0.5  # confidence


def _cells(text):
    """Columns that `text` takes in a terminal: Chinese, Japanese, Korean and emoji two each, combining marks none."""
    return sum(0 if unicodedata.category(c) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _terminal_lines(step, text, given, columns, empty, styles):
    """Lines of at most `columns` characters, each token of row 0 styled by its state. A hidden token of BPE begins with
    a space, as most words do."""
    ids, lines, line, width = step.ids[0].tolist(), [], "", 0
    sure, fresh, again = (part[0].tolist() for part in (step.confidence, step.fresh, step.remasked))
    for i, (token, piece) in enumerate(zip(ids, text.pieces(ids))):
        hidden = token == text.mask
        if token == text.end:
            piece = "" if i == 0 else "|" if empty == "_" else "¶"
        broken = piece.endswith("\n")
        shown = (empty if text.is_char else " " + 2 * empty) if hidden else "".join(c for c in piece if c.isprintable())
        if width and width + _cells(shown) > columns:
            lines, line, width = [*lines, line], "", 0
        while _cells(shown) > columns:
            shown = shown[:-1]
        state = ("fresh" if fresh[i] else "hidden again" if again[i] else "given" if given[i] else
                 "unsure" if not hidden and sure[i] < UNSURE_BELOW else None)
        line += f"\x1b[{styles[state]}m{shown}\x1b[0m" if state and shown else shown
        width += _cells(shown)
        if broken:
            lines, line, width = [*lines, line], "", 0
    return [*lines, line]


# --- a page of HTML ---------------------------------------------------------------------------------------------


def write_html(path, frames, text, title):
    """One self-contained page (no network, no dependency): trace.html with the recorded frames in it.

    Frames are stored as differences: what changed in a step, and the alternatives that were computed in it.
    """
    mask, steps, seen = text.mask, [], {}
    for before, frame in zip([None, *frames], frames):
        changed = [i for i in range(len(frame.ids)) if before is None or frame.ids[i] != before.ids[i]]
        entry = {"step": frame.number, "n": frame.nfe, "ids": [[i, frame.ids[i]] for i in changed],
                 "fresh": [i for i, x in enumerate(frame.fresh) if x],
                 "again": [i for i, x in enumerate(frame.remasked) if x],
                 "sure": [[i, round(c, 3)] for i, c in enumerate(frame.confidence)
                          if before is None or c != before.confidence[i]],
                 "top": [[i, [[t, round(p, 4)] for t, p in top]] for i, top in enumerate(frame.top or ())
                         if top and (before is None or not before.top or top != before.top[i])]}
        steps.append(entry)
    for entry in steps:
        seen.update({token: None for _, token in entry["ids"]})
        seen.update({token: None for _, top in entry["top"] for token, _ in top})
    tokens = {token: "" if token in (mask, text.end) else text.pieces([token])[0] for token in seen}
    data = {"title": title, "mask": mask, "end": text.end, "tokens": tokens, "steps": steps,
            "final": text.pieces(frames[-1].ids)}
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "trace.html"), encoding="utf-8") as file:
        page = file.read()
    # "<" is escaped, so that no token can end the script
    script = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = page.replace("/*DATA*/null", script)
    with cli.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(page)


# --- files ------------------------------------------------------------------------------------------------------


def write_mp4(path, images, frame_ms):
    """H.264, yuv420p: what browsers and QuickTime play. `images` as `pictures` yields them."""
    import av
    with cli.replacing(path, ValueError, av.error.FFmpegError) as temporary, av.open(
            temporary, "w", "mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(1000, frame_ms))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "20", "preset": "veryfast"}
        for image, seconds in images:
            frame = av.VideoFrame.from_image(image)
            for _ in range(max(1, round((seconds or 0) * 1000 / frame_ms))):
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _palette():
    """Image with the palette of a GIF: our colours, and their blends with what they stand on (the edges of letters).

    Fixed, because a palette chosen by how much of the picture a colour fills loses the colours that matter.
    """
    split = lambda name: name if isinstance(name, tuple) else tuple(int(name[i:i + 2], 16) for i in (1, 3, 5))
    pairs = [(colour, PAPER) for colour in (INK, FAINT, GIVEN, FRESH, REMASKED, CURVE, SURE, UNSURE)]
    pairs += [(INK, FRESH), (INK, CURVE), (INK, UNSURE), (INK, tint(0.5))]
    colours = {tuple(round(a + (b - a) * share / 6) for a, b in zip(split(front), split(back)))
               for front, back in pairs for share in range(7)}
    image = Image.new("P", (1, 1))
    image.putpalette([value for colour in sorted(colours) for value in colour])
    return image


def write_gif(path, images, frame_ms):
    """The same pictures, at half the size and in few colours."""
    small, times, palette = [], [], _palette()
    for image, seconds in images:
        small.append(image.resize((WIDTH // 2, HEIGHT // 2), Image.LANCZOS).quantize(palette=palette, dither=Image.Dither.NONE))
        times.append(frame_ms if seconds is None else int(1000 * seconds))
    with cli.replacing(path, ValueError) as temporary:
        small[0].save(temporary, "GIF", save_all=True, append_images=small[1:], duration=times, loop=0)


def check(path, ending):
    """Complain now if a picture file cannot be written at `path`."""
    if not path.endswith(ending):
        raise UserError(f"cannot write {path}: its name must end in {ending}")
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    if not os.access(os.path.dirname(path) or ".", os.W_OK) or os.path.isdir(path):
        raise UserError(f"cannot write {path}: the folder is not writable, or this is a folder")
