"""Text appearing out of masks in HTML: a page to step through, and single states."""

import html
import json
import os

from utils import cli, trace


def page(frames, tokenizer, title):
    """One self-contained page (str; no network, no dependency): trace.html with the recorded frames
    in it.

    Frames are stored as differences: what changed in a step, and the alternatives that were
    computed in it; but for random tokens that are noise.
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
            "changed": [i for i, x in enumerate(frame.changed) if x],
            "random": [i for i, x in enumerate(frame.noisy) if x and frame.ids[i] != mask],
            "noise": round(frame.noise, 4),
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
        "masks": frames[-1].masks,
        "given": trace.given_in(frames, tokenizer),
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


# the marks of the page, for `marked`; .dark is how gradio says that it is
STYLE = """<style>
.trace { font: 1.05rem/1.9 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; --faint: #8a867d; --given: #0072b2;
  --tint: 120, 175, 230; }
.dark .trace { --faint: #8d8f96; --given: #6cb8ea; --tint: 50, 105, 165; }
.trace span { border-radius: 4px; padding: .1em 0; }
.trace .noise { color: var(--faint); box-shadow: inset 0 0 0 1px var(--faint); }
.trace .mask { box-shadow: inset 0 0 0 1px var(--faint); }
.trace .fresh { background: #e69f00 !important; color: #1d1d1f; font-weight: 700; }
.trace .again { box-shadow: inset 0 0 0 2px #cc79a7; background: repeating-linear-gradient(135deg,
  transparent 0 4px, #cc79a7 4px 5px) !important; }
.trace .changed { box-shadow: inset 0 0 0 2px #e69f00; font-weight: 700; }
.trace .given { color: var(--given); text-decoration: underline; text-underline-offset: .25em; }
</style>"""


LEGEND = (
    '<div class="trace">'
    + " ".join(
        f'<span class="{kind}"{style}>{name}</span>'
        for kind, style, name in (
            ("mask", "", "masked"),
            ("noise", "", "noise"),
            ("fresh", "", "fresh, accepted"),
            ("changed", "", "changed"),
            ("", ' style="background: rgba(var(--tint), .8)"', "unsure"),
            ("again", "", "masked again, renoised"),
            ("given", "", "given"),
        )
    )
    + "</div>"
)


def marked(shown, given):
    """A `trace.Shown` with the marks of the page, in `STYLE`; given (L bools) is what the user
    wrote."""
    spans = []
    for i, token in enumerate(shown.tokens):
        changed, masked = shown.changed[i], token is None
        states = {
            "mask": masked,
            "again": shown.remasked[i],
            "fresh": shown.fresh[i] and not changed,
        }
        states |= {"changed": changed, "noise": shown.noisy[i] and not masked}
        kinds = [kind for kind, here in (states | {"given": given[i]}).items() if here]
        plain = given[i] or shown.noisy[i]
        share = 0 if plain else 0.9 * (1 - (shown.confidence[i] or 1))
        tint = f' style="background: rgba(var(--tint), {share:.2f})"' if share > 0.005 else ""
        text = "\u00a0\u00a0\u00a0" if token is None else html.escape(token)
        spans.append(f'<span class="{" ".join(kinds)}"{tint}>{text}</span>')
        if token is None:
            spans.append(" ")
    return f'<div class="trace">{"".join(spans)}</div>'


def escaped(text):
    """A text without a trace, as HTML."""
    return f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
