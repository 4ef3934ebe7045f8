"""A trace: the states of a sampler, recorded as frames for the viewers (video.py, page.py)."""

import os
from typing import NamedTuple

from utils import canvas
from utils.cli import UserError

MOST_STATES = 2**24  # of tokens, over all frames of a trace
UNASKED = 2**17  # the same of a trace that nobody asked for: 80 MB


class Frame(NamedTuple):
    number: int  # of the step, from 1; 0 is the canvas
    ids: list  # L ids of one row
    fresh: list  # L bools, unmasked or changed in this step
    changed: list  # L bools, which of them are other tokens than before, where there was no noise
    remasked: list  # L bools
    nfe: int  # of this row so far
    confidence: list  # L floats, the largest probability of each position when it was last
    # computed; 0: never, 1: given
    noisy: list  # L bools: MASK stands there, or a random token that is not yet accepted
    masks: bool  # whether noise is MASK
    top: list = None  # L lists of (token, probability), likeliest first, as last computed
    noise: float = 1.0  # share of noise in what is generated, from 1 to 0


class Trace(NamedTuple):
    """What the viewers are given."""

    frames: list  # of Frame
    tokenizer: object
    title: str


class Shown(NamedTuple):
    """A frame in words."""

    text: str  # so far, MASKED where nothing stands yet
    tokens: list  # of each position its str, None where masked
    fresh: list  # L bools, unmasked or changed in this step
    changed: list  # L bools, which of them were other tokens
    remasked: list  # L bools
    confidence: list  # L floats
    noisy: list  # L bools, noise stands there
    masks: bool  # whether noise is MASK
    nfe: int  # network evaluations so far
    number: int  # of the step; 0: the canvas
    noise: float  # share of noise in what is generated, from 1 to 0


MASKED = "░"


def shown(frame, blank, tokenizer, stop=True):
    """The Frame in words. blank is the canvas (list of ids) that it began as; stop: the text ends
    at its `<|endoftext|>`, once all before it is there, and what follows is "" in its tokens."""
    ids, masked = frame.ids, MASKED if tokenizer.is_char else " " + 2 * MASKED
    end = canvas.end(tokenizer, ids, blank) if stop else len(ids)
    tokens = [
        None if i == tokenizer.mask else piece for i, piece in zip(ids, tokenizer.pieces(ids))
    ]
    if tokenizer.mask in ids[:end]:
        text = "".join(masked if token is None else token for token in tokens)
    else:
        text = canvas.finished(tokenizer, ids, blank, stop)
        tokens[end:] = [""] * (len(ids) - end)
    return Shown(
        text,
        tokens,
        frame.fresh,
        frame.changed,
        frame.remasked,
        frame.confidence,
        frame.noisy,
        frame.masks,
        frame.nfe,
        frame.number,
        frame.noise,
    )


def most_states(row, how, family, mask):
    """How many states a trace of the row (list of ids) can have at most; a step that changes
    nothing has none."""
    masks, sampler = row.count(mask), family.sampler(how)
    if not sampler.may_remask and (not how.steps or sampler.one_a_step):
        return masks
    L, window = len(row), family.cfg.seq_len
    length = family.block_len or how.decode_block or (max(1, window // 4) if L > window else L)
    # The steps of the whole are shared among the blocks, rounded up in each. Without a number they
    # are those of uniform noise, one a position, at most.
    most = (how.steps or L) * (1 + how.correctors) + -(-L // length) - 1
    return most if sampler.may_remask else min(masks, most)


def least_every(row, how, family, mask, most):
    """The least trace_every with which a trace of the row (list of ids), as how (SampleConfig)
    wants it, has at most so many states of tokens: one takes some 100 bytes, with its alternatives
    600."""
    return -(-most_states(row, how, family, mask) * len(row) // most)


def check_states(row, how, family, mask):
    """Complain where the trace of a viewer would not fit into memory."""
    states, least = (
        most_states(row, how, family, mask),
        least_every(row, how, family, mask, MOST_STATES // (8 if how.viz_html else 1)),
    )
    if how.trace_every < least:
        raise UserError(
            f"up to {states // how.trace_every:,} states of {len(row):,} tokens are too many for a "
            f"trace; give --trace-every {least}"
        )


def blank_frame(canvas, mask, begun):
    """The Frame before the first step of a canvas (L,); begun (L,): what stands there, the canvas
    itself or a draft."""
    nothing, ids = [False] * len(canvas), begun.tolist()
    given, noisy = (canvas != mask).float().tolist(), [i == mask for i in ids]
    full = float(any(noisy))
    return Frame(0, ids, nothing, nothing, nothing, 0, given, noisy, True, noise=full)


def given_in(frames, tokenizer):
    """Which tokens the user gave, L bools."""
    ends = (tokenizer.mask, tokenizer.end)
    return [c == 1 and i not in ends for i, c in zip(frames[0].ids, frames[0].confidence)]


def record(steps, canvas, mask, every=1, begun=None):
    """Wrap the stream of `sampling.Step`s: returns (frames, iterator that yields the same steps).

    frames fills as the iterator is consumed: row 0 of `canvas`, or of the draft that it begins as,
    then of every `every`-th step, and of the last, unless nothing changed in it. What became fresh
    or was masked in steps between is marked in the next frame.
    """
    frames = [blank_frame(canvas[0], mask, (canvas if begun is None else begun)[0])]

    def watch():
        fresh = remasked = None
        for number, step in enumerate(steps, 1):
            fresh = step.fresh[0] if fresh is None else fresh & ~step.remasked[0] | step.fresh[0]
            remasked = (
                step.remasked[0]
                if remasked is None
                else remasked & ~step.fresh[0] | step.remasked[0]
            )
            if number % every == 0 and (fresh | remasked).any():
                frames.append(frame_of(number, step, frames[-1], fresh, remasked))
                fresh = remasked = None
            yield step
        if fresh is not None and (fresh | remasked).any():
            frames.append(frame_of(number, step, frames[-1], fresh, remasked))
        elif len(frames) > 1:  # what was asked since changed nothing
            now, kept = (
                frame_of(frames[-1].number, step, frames[-1]),
                ("fresh", "changed", "remasked"),
            )
            frames[-1] = now._replace(**{name: getattr(frames[-1], name) for name in kept})

    return frames, watch()


def frame_of(number, step, before, fresh=None, remasked=None):
    """The `Frame` of row 0 of a Step; fresh and remasked (L) bool, where they are not the step's,
    are of all since the Frame before."""
    fresh = (step.fresh[0] if fresh is None else fresh).tolist()
    remasked = (step.remasked[0] if remasked is None else remasked).tolist()
    ids, top = step.ids[0].tolist(), None
    there = zip(ids, before.ids, before.noisy)
    changed = [f and new != old and not noisy for f, (new, old, noisy) in zip(fresh, there)]
    if step.top is not None:
        tokens, p = (part[0].tolist() for part in step.top)
        # [] was never computed
        top = [list(zip(*pair)) if pair[1][0] > 0 else [] for pair in zip(tokens, p)]
    return Frame(
        number,
        ids,
        fresh,
        changed,
        remasked,
        int(step.row_nfe[0]),
        step.confidence[0].tolist(),
        step.masked[0].tolist(),
        step.masks,
        top,
        float(step.t[0]),
    )


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
