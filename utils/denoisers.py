"""Denoisers: what a network is shown of a canvas, and what it says of the positions that are asked.

A `Denoiser` is handed a network as an object (x (b, W), asked (b, W), `Window`) -> logits (N, V)
that counts its calls in `nfe` and says in `nfe_a_row` what one costs a row: `Plain`, `Guided`, or
one of kv_cache.py.
"""

import math
from typing import NamedTuple

import torch

from utils.cli import UserError
from utils.draws import at_least_float32


class MaskNoise:
    """Noise as the sampling loop sees it. Here it is MASK, and what is unmasked carries over.

    fill(ids (B, L), where (B, L), u (B, L))     ids with noise at the positions `where`
    read(logits (N, V), ids, asked, turn)        what the network says at the asked (B, L)
                                                 positions, as the next two take it
    belief(logits (N, V), ids, asked, turn)      p(x0_i | xt), (N, V), at the asked (B, L) positions
    reverse(p (n, V), ids, where, turn)          what tokens are drawn from at `where`, up to a
                                                 factor, for a network that says p of x0
    left(state, turn)                            share of noise after the step, (B,)
    """

    carry_over, first_tick, asks_all = True, 0, False

    def __init__(self, mask):
        self.mask = mask

    def fill(self, ids, where, u):
        return ids.masked_fill(where, self.mask)

    def read(self, logits, ids, asked, turn):
        return logits

    def belief(self, logits, ids, asked, turn):
        return logits.softmax(-1)

    def reverse(self, p, ids, where, turn):
        return p

    def left(self, state, turn):
        return state.masked.sum(1) / state.total.clamp(min=1)


class Window(NamedTuple):
    """Where what the network sees stands in the canvas: b rows, W positions."""

    rows: torch.Tensor  # (b,) long
    columns: torch.Tensor  # (b, W) long; None: all
    start: torch.Tensor  # (b, 1) first position of each row's block, in the window
    shift: torch.Tensor  # (b, 1) by which the window is moved
    turn: tuple  # the clock's `Turn`, of all rows
    earlier: torch.Tensor = None  # (b, W, C) what was predicted last (self_conditioning.py)


class Denoiser:
    """A network that is asked for tokens of a canvas (B, L), through a window where that is longer
    than the network can take.

    block_len   positions of a block; origin (B, 1): where each row's first one begins
    window      most positions that the network takes (None: any number)
    bos         tokens at the start of a row that are always in sight
    sees_right  whether the network looks at what comes after its block
    memory      of a network that is self-conditioned: `self_conditioning.Memory`
    """

    def __init__(
        self,
        network,
        noise,
        canvas,
        block_len,
        origin,
        window=None,
        bos=0,
        sees_right=True,
        memory=None,
    ):
        L = canvas.size(1)
        self.network, self.noise, self.block_len, self.origin = network, noise, block_len, origin
        self.bos, self.sees_right, self.width = bos, sees_right, min(L, window or L)
        self.memory = memory
        self.asks_all = bool(memory) or noise.asks_all  # or only what the policy unmasks
        if self.width < L and block_len >= self.width:
            raise UserError(
                f"a text of {L} tokens is longer than the window of {self.width}: "
                f"decode_block={block_len} must be less than {self.width}, {self.width // 4} say"
            )
        place = torch.arange(L, device=canvas.device)
        # all that is given ends before it, (B, 1)
        self.given_until = torch.where(canvas == noise.mask, 0, place + 1).amax(1, keepdim=True)
        self.row_nfe = torch.zeros(len(canvas), dtype=torch.long, device=canvas.device)
        self.generated, self.forbidden = canvas == noise.mask, None

    @property
    def nfe(self):
        return self.network.nfe

    def forbid(self, token, number):
        """Give the token no probability at the first `number` positions of each row that are
        generated."""
        if token is not None and number:
            self.forbidden = token, self.generated & (self.generated.cumsum(1) <= number)

    def __call__(self, ids, asked, turn):
        """Logits (N, V) at the asked (B, L) positions of ids (B, L). Rows that ask nothing, those
        that are finished say, are not computed, and cost nothing."""
        L, rows = ids.size(1), asked.any(1).nonzero()[:, 0]
        if not len(rows):
            return torch.empty(0, self.noise.mask, device=ids.device)
        x, seen, start = ids[rows], asked[rows], turn.start[rows]
        wanted = seen  # by their places in the canvas
        columns, shift = None, torch.zeros_like(start)
        earlier = self.memory and self.memory.read(rows, wanted)
        if self.width < L:
            columns, shift = self.columns(start, rows, L)
            x, seen = x.gather(1, columns), seen.gather(1, columns)
            # a last block may reach over the canvas's end
            seen &= shift + torch.arange(self.width, device=x.device) < L
            if earlier is not None:
                wide = columns[..., None].expand(-1, -1, earlier.size(-1))
                earlier = earlier.gather(1, wide)
        logits = self.network(x, seen, Window(rows, columns, start - shift, shift, turn, earlier))
        if self.memory:
            self.memory.write(rows, wanted, logits)
        self.row_nfe = self.row_nfe.index_add(
            0, rows, torch.full_like(rows, self.network.nfe_a_row)
        )
        logits = at_least_float32(logits)
        if self.forbidden:
            token, where = self.forbidden
            logits[where[rows][wanted], token] = -math.inf
        return self.noise.read(logits, ids, asked, turn)

    def columns(self, start, rows, L):
        """(positions (b, W) of a canvas of L that the network sees when rows (b,) denoise blocks
        that begin at start (b, 1), how far (b, 1) they are shifted): the block at the right end,
        and what is before it.

        Where something is given behind the block, up to a quarter of the window looks ahead. A
        network that does not see to the right looks ahead at nothing, and its window moves by a
        quarter at a time, in whole blocks, so that what it keeps lasts.
        """
        W, end = self.width, start + self.block_len
        if self.sees_right:
            room = min(W // 4, (W - self.block_len - self.bos) // 2)
            ahead = torch.where(self.given_until[rows] > end, room, 0)
            shift = ((end + ahead).clamp(max=L) - W).clamp(min=0)
        else:
            stride = max(1, W // 4 // self.block_len) * self.block_len
            shift = -(-(end - W).clamp(min=0) // stride) * stride
        columns = (shift + torch.arange(W, device=start.device)).clamp(max=L - 1)
        columns[:, : self.bos] = torch.arange(self.bos, device=start.device)
        return columns, shift


class Plain:
    """The network as it is. logits: function (x (b, W), index (N,), Window) -> (N, V)."""

    nfe_a_row = 1

    def __init__(self, logits):
        self.logits, self.nfe = logits, 0

    def __call__(self, x, asked, window):
        self.nfe += 1
        return self.logits(x, asked.flatten().nonzero()[:, 0], window)


class Guided:
    """Unsupervised classifier-free guidance (SMDM, arXiv:2410.18514): (1 + w) logits that see the
    prompt (B, L) bool of the canvas, minus w logits that have MASK there."""

    nfe_a_row = 2

    def __init__(self, logits, w, prompt, mask):
        self.logits, self.w, self.prompt, self.mask, self.nfe = logits, w, prompt, mask, 0

    def __call__(self, x, asked, window):
        self.nfe += 2
        prompt = self.prompt[window.rows]
        prompt = prompt if window.columns is None else prompt.gather(1, window.columns)
        index, earlier = asked.flatten().nonzero()[:, 0], window.earlier
        if earlier is not None:  # what was said of the canvas with its prompt is not for the blind
            earlier = torch.cat((earlier, torch.zeros_like(earlier)))
        both = self.logits(
            torch.cat((x, x.masked_fill(prompt, self.mask))),
            torch.cat((index, index + x.numel())),
            window._replace(earlier=earlier),
        )
        seeing, blind = at_least_float32(both).chunk(2)
        return (1 + self.w) * seeing - self.w * blind
