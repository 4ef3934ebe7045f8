"""Text appearing out of masks in the terminal."""

import os
import shutil
import sys
import time
import unicodedata

# state -> ANSI code
STYLES = {"fresh": "1;30;43", "unsure": "36", "masked again": "35", "given": "4;34"}
STYLES_WITHOUT_COLOUR = {"fresh": "1", "unsure": "2", "masked again": "7", "given": "4"}
UNSURE_BELOW = 0.5  # confidence


def live(steps, tokenizer, given, frame_ms=0, out=None):
    """Wrap the stream of `sampling.Step`s: shows row 0 in the terminal `out` after each, and yields
    the same steps.

    given (L bools) is what the user wrote. Not a terminal: shows nothing. A terminal that cannot
    move its cursor gets a line a step. Without colour (NO_COLOR), states are told apart by weight,
    underline and reversal alone. The text is drawn on the alternate screen, which leaves no trace,
    also after Ctrl-C.
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
            status = f"step {number}, {int(step.row_nfe[0])} NFE, " + (
                f"noise level {noise:.2f}" if noise else f"{left} of {total} masks left"
            )
            if plain:
                out.write(status + "\n")
            else:
                done = int(20 * (1 - noise)) if noise else 20 * (total - left) // max(1, total)
                bar = full * done + empty * (20 - done)
                out.write(_screen(f"{status}  {bar}", step, tokenizer, given, empty, styles))
            out.flush()
            yield step
            time.sleep(max(0.0, frame_ms / 1000 - (time.perf_counter() - started)))
    finally:
        if not plain:
            out.write("\x1b[0m\x1b[?25h\x1b[?1049l")
            out.flush()


def _screen(status, step, tokenizer, given, empty, styles):
    """What clears the screen and shows the status line, the legend if it fits, and the end of row
    0."""
    columns, lines = shutil.get_terminal_size()
    head = [status[:columns]]
    if sum(map(len, styles)) + 2 * len(styles) <= columns:
        head.append("  ".join(f"\x1b[{code}m{state}\x1b[0m" for state, code in styles.items()))
    shown = _terminal_lines(step, tokenizer, given, columns, empty, styles)
    return "\x1b[H\x1b[2J" + "\n".join([*head, "", *shown[-max(1, lines - len(head) - 2) :]])


def _cells(text):
    """Columns that `text` takes in a terminal: Chinese, Japanese, Korean and emoji two each,
    combining marks none."""
    return sum(
        0
        if unicodedata.category(c) in ("Mn", "Me")
        else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def _terminal_lines(step, tokenizer, given, columns, empty, styles):
    """Lines of at most `columns` characters, each token of row 0 styled by its state. A masked
    token of BPE begins with a space, as most words do."""
    ids, lines, line, width = step.ids[0].tolist(), [], "", 0
    sure, fresh, again = (part[0].tolist() for part in (step.confidence, step.fresh, step.remasked))
    for i, (token, piece) in enumerate(zip(ids, tokenizer.pieces(ids))):
        masked = token == tokenizer.mask
        if token == tokenizer.end:
            piece = "" if i == 0 else "|" if empty == "_" else "¶"
        broken = piece.endswith("\n")
        shown = (
            (empty if tokenizer.is_char else " " + 2 * empty)
            if masked
            else "".join(c for c in piece if c.isprintable())
        )
        if width and width + _cells(shown) > columns:
            lines, line, width = [*lines, line], "", 0
        while _cells(shown) > columns:
            shown = shown[:-1]
        states = {"fresh": fresh[i], "masked again": again[i], "given": given[i]}
        states["unsure"] = not masked and sure[i] < UNSURE_BELOW
        state = next((state for state, here in states.items() if here), None)
        line += f"\x1b[{styles[state]}m{shown}\x1b[0m" if state and shown else shown
        width += _cells(shown)
        if broken:
            lines, line, width = [*lines, line], "", 0
    return [*lines, line]
