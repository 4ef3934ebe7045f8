"""Text appearing out of masks, as MP4 or GIF: frames -> pictures -> a file.

Every token keeps its place from first to last, because the layout is that of the finished text.
States are told apart by shape as well as by colour (Okabe-Ito's colours, which colour-blind
readers can tell apart): a masked token is a hollow box, a fresh one bold on a filled box, a
remasked one a crossed box, given text is underlined. Noise that is a random token is pale in a
hollow box, one that is put there again in a crossed one; a token that was there already and is now
another is bold in a box. What the model has generated stands on a tint: the paler, the surer it
was.
"""

import functools
import math
import os
from fractions import Fraction
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from utils import cli, trace

WIDTH, HEIGHT, MARGIN = 1280, 720, 48
TEXT_TOP, TEXT_BOTTOM = 112, 580  # the text's part of the picture
PAPER, INK, FAINT, GIVEN = "#fbfaf7", "#1d1d1f", "#a9a59c", "#0072b2"
FRESH, REMASKED, CURVE, SURE = "#e69f00", "#cc79a7", "#56b4e9", "#d55e00"
UNSURE = (140, 190, 235)  # tint of a token of confidence 0; at 1 there is none
HOLD_SECONDS, PAGE_SECONDS = 3, 2


# --- fonts and characters -------------------------------------------------------------------------


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
    """The text of a token as it is drawn: a line break as an arrow, what the font lacks escaped
    (never a box)."""
    known, arrows = _known_characters(), {"\n": "↵", "\t": "→"}
    drawn = lambda c: ord(c) in known and (c == " " or c.isprintable())
    escaped = lambda c: c if drawn(c) else c.encode("unicode_escape").decode()
    return "".join(arrows.get(c) or escaped(c) for c in piece)


# --- layout ---------------------------------------------------------------------------------------


class Layout(NamedTuple):
    places: list  # (line, column) of each token, over all pages
    cells: list  # characters that each token takes, over all frames
    columns: int  # characters in a line
    lines: int  # lines on a page
    pages: int
    size: int  # font size in pixels


def _place(cells, pieces, columns):
    """(line, column) of each token; one that does not fit on the line goes to the next, whole
    unless longer than it.

    The space that a wrapped word begins with hangs in the margin (column -1), so that lines start
    flush.
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
    """Layout for the pieces (str) of every frame: the largest type in which the text fits, or pages
    of the smallest.

    A token's room is the widest that it is in any frame, at least one cell, so that nothing moves.
    """
    cells = [
        max(1, *(len(printable(piece)) for piece in column)) for column in zip(*pieces_of_frames)
    ]
    for size in (36, 32, 28, 24, 22, 20):
        columns = int((WIDTH - 2 * MARGIN) / font(size).getlength("m"))
        lines = int((TEXT_BOTTOM - TEXT_TOP) / (1.5 * size))
        places = _place(cells, pieces_of_frames[-1], columns)
        used = places[-1][0] + 1 + (cells[-1] - 1) // columns
        if used <= lines:
            break
    return Layout(places, cells, columns, lines, math.ceil(used / lines), size)


# --- drawing --------------------------------------------------------------------------------------


class Film(NamedTuple):
    """What all pictures of a trace share."""

    plan: Layout
    given: list  # L bools: what the user gave
    noise: list  # share of noise in each frame
    sure: list  # mean confidence of what is generated, in each frame (None: nothing yet)
    title: str
    masks: int  # how many there are at most; 0 where noise is random tokens
    changes: bool  # whether any token is changed


def draw(film, frame, pieces, number, page):
    """One picture (PIL.Image) of the frame with that number, on that page: the text in its states,
    the title line, how much noise is left and its timeline. pieces: text of each token in this
    frame, None where it is a MASK."""
    plan, given = film.plan, film.given
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen = ImageDraw.Draw(image)
    cell, line_height = font(plan.size).getlength("m"), 1.5 * plan.size
    for i, (piece, (first, column)) in enumerate(zip(pieces, plan.places)):
        text = None if piece is None else printable(piece).ljust(plan.cells[i])
        # one, unless the token is longer than a line
        for part in range(0, plan.cells[i], plan.columns):
            line = first + part // plan.columns
            if line // plan.lines == page:
                x, y = MARGIN + column * cell, TEXT_TOP + line % plan.lines * line_height
                width = min(plan.cells[i] - part, plan.columns) * cell
                box = (x + 1, y + 1, x + max(width - 2, 4), y + 1.25 * plan.size)
                shown = text and text[part : part + plan.columns].rstrip()
                state = (given[i], frame.fresh[i], frame.remasked[i], frame.confidence[i] or 1.0)
                look = Look(shown, *state, frame.noisy[i] and shown is not None, frame.changed[i])
                _draw_token(pen, box, plan.size, look)
    left = sum(frame.noisy)
    masks = f"{left} mask{'s' * (left != 1)} left of {film.masks}"
    status = masks if film.masks else f"noise level {film.noise[number]:.2f}"
    _draw_header(pen, film.title, f"NFE {frame.nfe}   {status}", page, plan.pages)
    _draw_timeline(pen, film.noise, film.sure, number)
    _draw_legend(pen, any(given), film)
    return image


def tint(confidence):
    """Colour (r, g, b) of the paper behind a token: the surer the model was, the paler."""
    paper = [int(PAPER[i : i + 2], 16) for i in (1, 3, 5)]
    return tuple(round(c * confidence + u * (1 - confidence)) for c, u in zip(paper, UNSURE))


class Look(NamedTuple):
    """What is drawn of a token."""

    text: str = None  # None: a MASK
    given: bool = False
    fresh: bool = False
    remasked: bool = False
    confidence: float = 1.0
    noisy: bool = False
    changed: bool = False


def _draw_token(pen, box, size, look):
    """A token in its box (x0, y0, x1, y1), in type of that size."""
    (x0, y0, x1, y1), (text, given, fresh, remasked, confidence, noisy, changed) = box, look
    if text is None or noisy:
        pen.rounded_rectangle(
            (x0, y0 + 3, x1, y1 - 1),
            4,
            outline=REMASKED if remasked else FAINT,
            width=2 if remasked else 1,
        )
        if remasked:
            pen.line((x0 + 3, y1 - 4, x1 - 3, y0 + 6), fill=REMASKED, width=2)
        if noisy:
            pen.text((x0 - 1, y0), text, font=font(size), fill=FAINT)
        return
    if changed:
        pen.rounded_rectangle(box, 4, outline=FRESH, width=3)
    elif fresh:
        pen.rounded_rectangle(box, 4, fill=FRESH)
    elif not given:
        pen.rounded_rectangle(box, 4, fill=tint(confidence))
    mark = not text.strip("↵→¶")  # a line break or an end of text, not something to read
    pen.text(
        (x0 - 1, y0),
        text,
        font=font(size, "-Bold" if fresh else ""),
        fill=INK if fresh else FAINT if mark else GIVEN if given else INK,
    )
    if given and not mark:
        pen.line((x0, y1, x1, y1), fill=GIVEN, width=1)


def _draw_header(pen, title, status, page, pages):
    pen.text((MARGIN, 28), title, font=font(22, "-Bold"), fill=INK)
    pen.text(
        (MARGIN, 62),
        status + (f"   page {page + 1} of {pages}" if pages > 1 else ""),
        font=font(20),
        fill=INK,
    )


def _draw_timeline(pen, noise, sure, number):
    """Noise over the frames, a faint curve for what comes, filled up to now; and mean confidence, a
    dotted curve."""
    left, right, top, bottom = MARGIN, WIDTH - MARGIN, 604, 662
    x = lambda i: left + (right - left) * i / max(1, len(noise) - 1)
    y = lambda share: bottom - (bottom - top) * share
    points = [(x(i), y(share)) for i, share in enumerate(noise)]
    if number:
        pen.polygon([(left, bottom), *points[: number + 1], (x(number), bottom)], fill=CURVE)
    pen.line(points, fill=FAINT, width=2)
    pen.line((left, bottom, right, bottom), fill=FAINT, width=1)
    dots = [(x(i), y(share)) for i, share in enumerate(sure[: number + 1]) if share is not None]
    for px, py in dots[:: max(1, len(dots) // 100)]:
        pen.ellipse((px - 2, py - 2, px + 2, py + 2), fill=SURE)
    pen.line((x(number), top - 4, x(number), bottom + 4), fill=INK, width=2)


def _draw_legend(pen, prompted, film):
    x, y, size = MARGIN, 680, 16
    looks = {"settled": Look("a"), "unsure": Look("a", confidence=0.3)}
    changed = {"changed": Look("a", fresh=True, changed=True)} if film.changes else {}
    if film.masks:
        looks = {"masked": Look(), "fresh": Look("a", fresh=True)} | changed | looks
        looks["masked again"] = Look(remasked=True)
    else:
        noise = {"noise": Look("a", noisy=True), "accepted": Look("a", fresh=True)}
        looks = noise | changed | looks | {"renoised": Look("a", remasked=True, noisy=True)}
    looks |= {"given": Look("a", given=True)} if prompted else {}
    for name, look in looks.items():
        _draw_token(pen, (x, y, x + 12, y + 20), size, look)
        pen.text((x + 20, y), name, font=font(size), fill=INK)
        x += 20 + font(size).getlength(name) + 28
    pen.text(
        (WIDTH - MARGIN, y),
        "area: noise   dots: mean confidence",
        font=font(size),
        fill=INK,
        anchor="ra",
    )


def without_beginning(frame, n):
    """The Frame without its first n tokens."""
    names = ("ids", "fresh", "changed", "remasked", "confidence", "noisy")
    return frame._replace(**{name: getattr(frame, name)[n:] for name in names})


def pictures(frames, tokenizer, title):
    """Yield (PIL.Image, seconds or None) for recorded `frames`: None is the normal time, the last
    picture is held.

    A text of several pages is shown on the page that is being generated, and page by page at the
    end.
    """
    mask, first = tokenizer.mask, frames[0].ids
    read = tokenizer.pieces(first)
    # what it begins with and reads as nothing takes no room, so that lines begin below each other
    begin = next((i for i, piece in enumerate(read) if piece or first[i] == mask), 0)
    frames = [without_beginning(frame, begin) for frame in frames]
    shown = lambda ids: [
        None if i == mask else "¶" if i == tokenizer.end else piece
        for i, piece in zip(ids, tokenizer.pieces(ids))
    ]
    pieces = [shown(frame.ids) for frame in frames]
    plan = layout([[piece or "" for piece in column] for column in pieces])
    given, sure = trace.given_in(frames, tokenizer), []
    for frame in frames:
        generated = [
            c
            for noisy, c, first in zip(frame.noisy, frame.confidence, frames[0].confidence)
            if not noisy and first < 1
        ]
        sure.append(sum(generated) / len(generated) if generated and frame.number else None)
    masks = max(1, *(sum(frame.noisy) for frame in frames)) if frames[-1].masks else 0
    changes, noise = any(any(f.changed) for f in frames), [frame.noise for frame in frames]
    film, page = Film(plan, given, noise, sure, title, masks, changes), 0
    for number, frame in enumerate(frames):
        on_pages = [
            line // plan.lines for (line, _), fresh in zip(plan.places, frame.fresh) if fresh
        ]
        if on_pages and page not in on_pages:
            page = on_pages[0]
        last = number == len(frames) - 1
        for page in range(plan.pages) if last else (page,):
            image = draw(film, frame, pieces[number], number, page)
            yield image, (HOLD_SECONDS if plan.pages == 1 else PAGE_SECONDS) if last else None


# --- files ----------------------------------------------------------------------------------------


def write_mp4(path, images, frame_ms):
    """H.264, yuv420p: what browsers and QuickTime play. `images` as `pictures` yields them."""
    import av

    with (
        cli.replacing(path, ValueError, av.error.FFmpegError) as temporary,
        av.open(temporary, "w", "mp4", options={"movflags": "faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(1000, frame_ms))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "20", "preset": "veryfast"}
        for image, seconds in images:
            frame = av.VideoFrame.from_image(image)
            for _ in range(max(1, round((seconds or 0) * 1000 / frame_ms))):
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _palette():
    """Image with the palette of a GIF: our colours, and their blends with what they stand on (the
    edges of letters).

    Fixed, because a palette chosen by how much of the picture a colour fills loses the colours that
    matter.
    """
    split = lambda name: (
        name if isinstance(name, tuple) else tuple(int(name[i : i + 2], 16) for i in (1, 3, 5))
    )
    pairs = [
        (colour, PAPER) for colour in (INK, FAINT, GIVEN, FRESH, REMASKED, CURVE, SURE, UNSURE)
    ]
    pairs += [(INK, FRESH), (INK, CURVE), (INK, UNSURE), (INK, tint(0.5))]
    colours = {
        tuple(round(a + (b - a) * share / 6) for a, b in zip(split(front), split(back)))
        for front, back in pairs
        for share in range(7)
    }
    image = Image.new("P", (1, 1))
    image.putpalette([value for colour in sorted(colours) for value in colour])
    return image


def write_gif(path, images, frame_ms):
    """The same pictures, at half the size and in few colours."""
    small, times, palette = [], [], _palette()
    for image, seconds in images:
        small.append(
            image.resize((WIDTH // 2, HEIGHT // 2), Image.LANCZOS).quantize(
                palette=palette, dither=Image.Dither.NONE
            )
        )
        times.append(frame_ms if seconds is None else int(1000 * seconds))
    with cli.replacing(path, ValueError) as temporary:
        small[0].save(
            temporary, "GIF", save_all=True, append_images=small[1:], duration=times, loop=0
        )
