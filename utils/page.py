"""Text appearing out of masks on a page of HTML to step through."""

import html
import json
import os

from utils import cli


def page(frames, tokenizer, title):
    """One self-contained page (str; no network, no dependency): trace.html with the recorded frames
    in it.

    Frames are stored as differences: what changed in a step, and the alternatives that were
    computed in it.
    """
    mask, steps, seen = tokenizer.mask, [], {}
    for before, frame in zip([None, *frames], frames):
        changed = [
            i for i in range(len(frame.ids)) if before is None or frame.ids[i] != before.ids[i]
        ]
        entry = {
            "step": frame.number,
            "n": frame.nfe,
            "ids": [[i, frame.ids[i]] for i in changed],
            "fresh": [i for i, x in enumerate(frame.fresh) if x],
            "again": [i for i, x in enumerate(frame.remasked) if x],
            "sure": [
                [i, round(c, 3)]
                for i, c in enumerate(frame.confidence)
                if before is None or c != before.confidence[i]
            ],
            "top": [
                [i, [[t, round(p, 4)] for t, p in top]]
                for i, top in enumerate(frame.top or ())
                if top and (before is None or not before.top or top != before.top[i])
            ],
        }
        steps.append(entry)
    for entry in steps:
        seen.update({token: None for _, token in entry["ids"]})
        seen.update({token: None for _, top in entry["top"] for token, _ in top})
    tokens = {
        token: "" if token in (mask, tokenizer.end) else tokenizer.pieces([token])[0]
        for token in seen
    }
    data = {
        "title": title,
        "mask": mask,
        "end": tokenizer.end,
        "tokens": tokens,
        "steps": steps,
        "final": tokenizer.pieces(frames[-1].ids),
    }
    with open(
        os.path.join(os.path.dirname(os.path.abspath(__file__)), "trace.html"), encoding="utf-8"
    ) as file:
        template = file.read()
    # "<" is escaped, so that no token can end the script
    script = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace("/*DATA*/null", script)


def write_html(path, frames, tokenizer, title):
    """`page` as a file."""
    with cli.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(page(frames, tokenizer, title))


def framed(frames, tokenizer, title):
    """`page` for a notebook's cell: in a frame, where its names and keys are its own, as high as
    the text may need (characters are some 11 pixels wide, lines 37 high)."""
    length = len("".join(tokenizer.pieces(frames[-1].ids)))
    height = min(900, 300 + 37 * (1 + length // 70))
    inside = html.escape(page(frames, tokenizer, title))
    return (
        f'<iframe srcdoc="{inside}" sandbox="allow-scripts" title="{html.escape(title)}" '
        f'style="width: 100%; height: {height}px; border: 0"></iframe>'
    )


def escaped(text):
    """A text without a trace, as HTML."""
    return f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
