"""Text appearing out of masks in the terminal, and progress bars, by `rich`, which is imported only
where there is a terminal to draw on."""

import contextlib
import sys
import time

# state -> style; without colour (NO_COLOR), states are told apart by weight, underline and reversal
STYLES = {
    "fresh": "bold black on yellow",
    "unsure": "cyan",
    "masked again": "magenta",
    "given": "underline blue",
}
STYLES_WITHOUT_COLOUR = {
    "fresh": "bold",
    "unsure": "dim",
    "masked again": "reverse",
    "given": "underline",
}
UNSURE_BELOW = 0.5  # confidence


def live(steps, tokenizer, given, frame_ms=0, out=None):
    """Wrap the stream of `sampling.Step`s: shows row 0 in the terminal `out` after each, and yields
    the same steps.

    given (L bools) is what the user wrote. Neither a terminal nor a notebook: shows nothing. A
    terminal that cannot move its cursor gets a line a step. The text is drawn on the alternate
    screen, which leaves no trace, also after Ctrl-C.
    """
    from rich.console import Console
    from rich.live import Live

    out = out or sys.stdout
    console = Console(file=out, highlight=False)
    if not (out.isatty() or console.is_jupyter):  # FORCE_COLOR makes no terminal of a pipe
        yield from steps
        return
    full, empty = "█░" if console.encoding.startswith("utf") else "#_"
    total, lines = None, console.is_dumb_terminal
    screen = Live(console=console, screen=not console.is_jupyter, auto_refresh=False)
    with contextlib.nullcontext() if lines else screen:
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
            if lines:
                console.print(status, soft_wrap=True)
            else:
                done = int(20 * (1 - noise)) if noise else 20 * (total - left) // max(1, total)
                status += "  " + full * done + empty * (20 - done)
                screen.update(picture(console, status, step, tokenizer, given, empty), refresh=True)
            yield step
            time.sleep(max(0.0, frame_ms / 1000 - (time.perf_counter() - started)))


def picture(console, status, step, tokenizer, given, empty):
    """The status line, the legend if it fits, and the end of row 0, as much as the screen holds."""
    from rich.console import Group
    from rich.text import Text

    styles, width = STYLES_WITHOUT_COLOUR if console.no_color else STYLES, console.width
    legend = Text("  ").join(Text(state, style) for state, style in styles.items())
    head = [Text(status, overflow="crop", no_wrap=True)]
    head += [legend] if len(legend) <= width else []
    shown = styled(step, tokenizer, given, empty, styles).wrap(console, width, overflow="fold")
    return Group(*head, "", *shown[-max(1, console.height - len(head) - 2) :])


def styled(step, tokenizer, given, empty, styles):
    """Row 0 as a rich Text, each token styled by its state. A masked token of BPE begins with a
    space, as most words do."""
    from rich.text import Text

    ids, text = step.ids[0].tolist(), Text()
    sure, fresh, again = (part[0].tolist() for part in (step.confidence, step.fresh, step.remasked))
    for i, (token, piece) in enumerate(zip(ids, tokenizer.pieces(ids))):
        masked = token == tokenizer.mask
        if masked:
            piece = empty if tokenizer.is_char else " " + 2 * empty
        elif token == tokenizer.end:
            piece = "" if i == 0 else "|" if empty == "_" else "¶"
        states = {"fresh": fresh[i], "masked again": again[i], "given": given[i]}
        states["unsure"] = not masked and sure[i] < UNSURE_BELOW
        state = next((state for state, here in states.items() if here), None)
        text.append("".join(c for c in piece if c.isprintable() or c == "\n"), styles.get(state))
    return text


@contextlib.contextmanager
def progress(total, unit, hidden=False, out=None):
    """A function of how many of the total are done, beside a progress bar in the terminal `out`
    (default: that of errors) that goes away at the end; elsewhere, and where hidden, no bar."""
    out = out or sys.stderr
    if hidden or not out.isatty():
        yield lambda done: None
        return
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn(unit),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(file=out), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)
