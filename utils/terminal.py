"""Text appearing out of masks in the terminal, and progress bars, by `rich`, which is imported only
where there is a terminal to draw on."""

import contextlib
import sys
import time
from typing import NamedTuple

# state -> style; without colour (NO_COLOR), states are told apart by weight, underline and reversal
STYLES = {
    "fresh": "bold black on yellow",
    "changed": "bold yellow",
    "noise": "bright_black",
    "unsure": "cyan",
    "masked again": "magenta",
    "given": "underline blue",
}
STYLES_WITHOUT_COLOUR = {
    "fresh": "bold",
    "changed": "bold italic",
    "noise": "dim italic",
    "unsure": "dim",
    "masked again": "reverse",
    "given": "underline",
}
OF_RANDOM_TOKENS = {"fresh": "accepted", "masked again": "renoised"}  # what their states are called
UNSURE_BELOW = 0.5  # confidence


def live(steps, tokenizer, given, frame_ms=0, noisy=None, out=None):
    """Wrap the stream of `sampling.Step`s: shows row 0 in the terminal `out` after each, and yields
    the same steps.

    given (L bools) is what the user wrote; noisy (L bools): where noise is at first, None:
    everywhere. Neither a terminal nor a notebook: shows nothing. A
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
            total, noise = total or left + int(step.fresh[0].sum()), float(step.t[0])
            status = f"step {number}, {int(step.row_nfe[0])} NFE, " + (
                f"{left} of {total} masks left" if step.masks else f"noise level {noise:.2f}"
            )
            if lines:
                console.print(status, soft_wrap=True)
            else:
                share = (total - left) / max(1, total) if step.masks else 1 - noise
                done = int(20 * share + 1e-6)
                status += "  " + full * done + empty * (20 - done)
                look = Look(console, tokenizer, empty, {} if step.masks else OF_RANDOM_TOKENS)
                states = states_of(step, noisy, given)
                screen.update(picture(look, status, step, states), refresh=True)
            noisy = step.masked[0].tolist()
            yield step
            time.sleep(max(0.0, frame_ms / 1000 - (time.perf_counter() - started)))


def states_of(step, noisy, given):
    """State of each token of row 0, "" of a settled one; noisy (L bools): where there was noise
    before, None: nobody knows."""
    sure, fresh, again, masked = (
        part[0].tolist() for part in (step.confidence, step.fresh, step.remasked, step.masked)
    )
    names = []
    for i, level in enumerate(sure):
        changed = fresh[i] and noisy is not None and not noisy[i]
        states = {"changed": changed, "fresh": fresh[i], "masked again": again[i]}
        states |= {"given": given[i], "noise": masked[i], "unsure": 0 < level < UNSURE_BELOW}
        names.append(next((state for state, here in states.items() if here), ""))
    return names


class Look(NamedTuple):
    """What all pictures share."""

    console: object
    tokenizer: object
    empty: str  # a cell of a MASK
    names: dict  # state -> what the legend calls it, if not so


def picture(look, status, step, states):
    """The status line, the legend if it fits, and the end of row 0, as much as the screen holds.
    states: of each token, see `states_of`."""
    from rich.console import Group
    from rich.text import Text

    console, width = look.console, look.console.width
    styles = STYLES_WITHOUT_COLOUR if console.no_color else STYLES
    always = ("fresh", "unsure", "masked again", "given")
    shown = [state for state in styles if state in always or state in states]
    legend = Text("  ").join(Text(look.names.get(state, state), styles[state]) for state in shown)
    head = [Text(status, overflow="crop", no_wrap=True)]
    head += [legend] if len(legend) <= width else []
    shown = styled(look, step, states, styles).wrap(console, width, overflow="fold")
    return Group(*head, "", *shown[-max(1, console.height - len(head) - 2) :])


def styled(look, step, states, styles):
    """Row 0 as a rich Text, each token styled by its state. A masked token of BPE begins with a
    space, as most words do."""
    from rich.text import Text

    (_, tokenizer, empty, _), ids, text = look, step.ids[0].tolist(), Text()
    for i, (token, piece) in enumerate(zip(ids, tokenizer.pieces(ids))):
        if token == tokenizer.mask:
            piece = empty if tokenizer.is_char else " " + 2 * empty
        elif token == tokenizer.end:
            piece = "" if i == 0 else "|" if empty == "_" else "¶"
        state = "" if token == tokenizer.mask and states[i] in ("noise", "unsure") else states[i]
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
