"""What the sampling loop keeps: the state of the canvas, and the clock that says whose turn it is.

All tensors are of all B rows of the canvas; the denoiser alone leaves out rows that ask nothing.
"""

from typing import NamedTuple

import torch

from utils.draws import precision_of
from utils.policies import View, max_probability


class Step(NamedTuple):
    """The state after a step; tensors on the model's device, the sampler's own: copy what you keep.
    NFE is the number of function evaluations: calls of the network."""

    ids: torch.Tensor  # (B, L) long, noise where not yet unmasked
    masked: torch.Tensor  # (B, L) bool, not yet unmasked
    fresh: torch.Tensor  # (B, L) bool, unmasked or changed in this step
    remasked: torch.Tensor  # (B, L) bool, masked again in this step
    confidence: torch.Tensor  # (B, L) float32, largest probability when last computed; 1: given
    top: tuple  # (tokens (B, L, top) long, probabilities), when last computed; or None
    nfe: int  # so far, whatever the rows of a call
    row_nfe: torch.Tensor  # (B,) long, of each row; with guidance two a step
    t: torch.Tensor  # (B,) share of noise in what is generated, from 1 to 0
    masks: bool  # whether noise is MASK, and no random token


class State:
    """A canvas (B, L) while it is denoised.

    editable  (B, L) bool, what is generated: the rest is given, and never changes
    masked    (B, L) bool, what of it is not yet unmasked
    noise     what stands there until then: `denoisers.MaskNoise`, or `uniform.UniformNoise`
    u         (B, L) uniforms of the first noise
    top       how many of the likeliest tokens of each position to keep for viewers
    draft     (B, L) long, what stands there at first instead of noise, or None
    """

    def __init__(self, canvas, noise, u, top=0, draft=None):
        self.noise, self.editable, self.drafted = noise, canvas == noise.mask, draft is not None
        self.masked, self.total = self.editable, self.editable.sum(1)
        self.ids = noise.fill(canvas, self.masked, u)
        if self.drafted:
            self.ids = torch.where(self.editable, draft, canvas)
            self.masked = torch.zeros_like(self.editable)
        self.confidence = self.probability = torch.where(self.editable, 0.0, 1.0)
        self.fresh = self.remasked = torch.zeros_like(self.masked)
        shape = (*canvas.shape, min(top, noise.mask))
        self.top = (canvas.new_zeros(shape), self.confidence.new_zeros(shape)) if top else None

    def view(self, turn, u, sampler, min_tokens):
        """What the sampler's policy sees."""
        open_ = self.masked if self.noise.carry_over else self.editable
        unmasked = self.editable & ~self.masked
        return View(
            open_ & turn.inside,
            unmasked & turn.inside,
            turn.m_t,
            turn.m_s,
            turn.steps_left,
            u,
            self.confidence,
            self.probability,
            None,
            sampler.value,
            min_tokens,
            turn.corrects,
        )

    def observe(self, asked, p):
        """Keep what p (N, V), the distributions at the asked positions (B, L), says of them."""
        self.confidence = self.confidence.masked_scatter(asked, max_probability(p).float())
        if self.top:
            best = p.topk(self.top[0].size(-1))
            self.top = tuple(
                old.masked_scatter(asked[..., None], new.to(old.dtype))
                for old, new in zip(self.top, (best.indices, best.values))
            )

    def unmask(self, where, tokens, p):
        """Put the tokens (n,), whose distributions were p (n, V), at the positions `where` (B,
        L)."""
        ids = self.ids.masked_scatter(where, tokens)
        probability = p.gather(1, tokens[:, None])[:, 0].float()
        self.probability = self.probability.masked_scatter(where, probability)
        self.fresh = where & (self.masked | (ids != self.ids))
        self.ids, self.masked = ids, self.masked & ~where

    def remask(self, where, u):
        """Put noise, of the uniforms u (B, L), at the positions `where` (B, L)."""
        self.remasked = where & ~self.masked
        self.ids, self.masked = self.noise.fill(self.ids, where, u), self.masked | where

    def fill_up(self, where, token):
        """Put a token, certain, at the masked positions of `where` (B, L)."""
        where = where & self.masked
        self.ids, self.confidence = (
            part.masked_fill(where, value)
            for part, value in ((self.ids, token), (self.confidence, 1))
        )
        self.masked, self.fresh = self.masked & ~where, self.fresh | where

    def step(self, denoiser, turn):
        """The `Step` to show."""
        return Step(
            self.ids,
            self.masked,
            self.fresh,
            self.remasked,
            self.confidence,
            self.top,
            denoiser.nfe,
            denoiser.row_nfe,
            self.noise.left(self, turn),
            self.noise.carry_over,
        )


class Turn(NamedTuple):
    """Whose turn it is. Rows that are finished have nothing inside."""

    inside: torch.Tensor  # (B, L) bool, the block that each row is denoising
    block: torch.Tensor  # (B,) long, its number; L: the row is finished
    start: torch.Tensor  # (B, 1) long, its first position
    done: torch.Tensor  # (B,) long, steps done in it
    steps_left: torch.Tensor  # (B, 1) long, this one included
    m_t: torch.Tensor  # (B, 1) mask ratio (or noise level) that the grid has before this step
    m_s: torch.Tensor  # (B, 1) the same after it; of a corrector, both are what is reached
    corrects: bool  # whether this is a corrector's step, which leaves the level as it is
    temperature: float  # of this step; or (B, 1), where it falls over the steps

    def temperature_at(self, where):
        """The temperature, or (n, 1) of each of the positions `where` (B, L)."""
        if not torch.is_tensor(self.temperature):
            return self.temperature
        return self.temperature.expand(where.shape)[where][:, None]


class Clock:
    """Blocks from left to right, each through the grid of mask ratios from 1 to 0, the steps shared
    among them.

    Blocks have denoiser.block_len tokens and begin at denoiser.origin (B, 1). A row goes to the
    next when its block has no mask left, and, if its policy may remask, the grid is at its end; or
    if it accepts and renoises, when all is accepted and nothing has changed.

    grid  function of time, from 1 to 0 in a block, to the mask ratio
    how   SampleConfig: steps of the whole canvas (None: one a token, under uniform noise one a
          position), rounded up in each block; correctors after each step
    stop  token id: a row whose finished blocks hold it, behind all that is given, is filled up
    """

    def __init__(self, state, denoiser, sampler, grid, how, stop=None):
        (B, L), device = state.ids.shape, state.ids.device
        self.denoiser, self.grid, self.steps = denoiser, grid, how.steps
        self.may_remask, self.correctors, self.stop = sampler.may_remask, how.correctors, stop
        self.renoises, self.temperatures = (
            sampler.renoises,
            (how.temperature, how.final_temperature),
        )
        self.precision = precision_of(device)
        self.place = torch.arange(L, device=device)
        self.block_ids = (self.place - denoiser.origin).clamp(min=0) // denoiser.block_len  # (B, L)
        self.block = torch.full((B,), -1, device=device)
        self.over = torch.ones_like(self.block, dtype=torch.bool)  # whether the block is finished
        self.done, self.planned = torch.zeros_like(self.block), torch.ones_like(self.block)  # steps
        self.correcting = 0  # corrector's steps that are still to do before the next one

    def turn(self, state):
        """The next `Turn`; None when every row is finished."""
        L = state.ids.size(1)
        todo = state.masked
        if state.drafted:  # nothing is masked, and every block has its turn
            todo = state.editable & (self.block_ids > self.block[:, None])
        following = torch.where(todo, self.block_ids, L).amin(1)
        self.block = torch.where(self.over, following, self.block)
        if not (self.block < L).any():
            return None
        self.inside = self.block_ids == self.block[:, None]
        self.done = torch.where(self.over, 0, self.done)
        self.planned = torch.where(self.over, self.share(state), self.planned)
        # policies that unmask one token a step may take more steps than planned
        left = (self.planned - self.done).clamp(min=1)[:, None]
        m_t, m_s = (
            self.grid(steps.to(self.precision) / self.planned[:, None])
            for steps in (left, left - 1)
        )
        if self.renoises:  # not the grid's: what is accepted is clean, and all else is noise
            inside = state.editable & self.inside
            share = (state.masked & inside).sum(1, keepdim=True) / inside.sum(
                1, keepdim=True
            ).clamp(min=1)
            share = share.to(self.precision)
            m_t = share.maximum(m_t) if state.drafted else share
        corrects = self.correcting > 0
        inside = self.inside
        if corrects:  # a row that begins a block has nothing to correct
            inside = inside & (self.done > 0)[:, None]
        return Turn(
            inside,
            self.block,
            self.denoiser.origin + self.block[:, None] * self.denoiser.block_len,
            self.done,
            left,
            m_t,
            m_t if corrects else m_s,
            corrects,
            self.temperature(),
        )

    def temperature(self):
        """Of the next step: falling from the first of a block to its last, (B, 1), if it falls."""
        first, last = self.temperatures
        if last is None:
            return first
        share = self.done / (self.planned - 1).clamp(min=1)
        return (first + (last - first) * share.clamp(max=1)).clamp(min=1e-4)[:, None]

    def share(self, state):
        """Steps (B,) long of the block that each row is denoising."""
        masks = (state.editable & self.inside).sum(1)
        if self.steps:
            masks = -(-self.steps * masks // state.total.clamp(min=1))
        elif not state.noise.carry_over:  # not of the tokens: a row must not depend on its batch
            masks = torch.full_like(masks, self.denoiser.block_len)
        return masks.clamp(min=1)

    def advance(self, state):
        """The step is done."""
        if self.correcting:
            self.correcting -= 1
        else:
            self.done, self.correcting = self.done + 1, self.correctors
        self.over = ~(state.masked & self.inside).any(1)
        if self.may_remask:
            stable = self.renoises & ~((state.fresh | state.remasked) & self.inside).any(1)
            self.over &= (self.done >= self.planned) | stable
        if self.stop is not None:
            finished = state.editable & ~state.masked & (self.block_ids <= self.block[:, None])
            ends = (state.ids == self.stop) & finished & (self.place >= self.denoiser.given_until)
            state.fill_up((self.over & ends.any(1))[:, None], self.stop)
