"""What the forward process did to a batch, and how it is cut into pieces."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from utils import runtime


class Corruption(NamedTuple):
    """q(xt | x0) of a batch: what is corrupted, and how much it weighs in the loss."""

    masked: torch.Tensor  # (B, L) bool, masked: or replaced (uniform noise), predicted (ar)
    weight: torch.Tensor  # (B,) float32; the loss of a row is weight * sum of CE over masked / L.
    #                       With blocks (B, K), of the K blocks of a row
    most: torch.Tensor = None  # (B,) how many positions of a row can be masked, if that is known
    index: torch.Tensor = None  # (N,) flat positions of the masked, and -1 to fill up; found on the
    #                             CPU, so that a GPU need not wait
    noise: torch.Tensor = None  # (B, L) long, modulo V the tokens that uniform noise puts there
    level: torch.Tensor = None  # (B,) float32, of uniform noise, which a row does not show; with
    #                             blocks (B, K)
    conditioned: torch.Tensor = None  # (B,) bool, rows with a first pass (self_conditioning.py)

    def each(self, function):
        """A Corruption of what `function` makes of each part that there is."""
        return Corruption(*(part if part is None else function(part) for part in self))

    def indexed(self, length=0):
        """With its index, filled up to `length`."""
        index = self.masked.flatten().nonzero()[:, 0]
        assert not length or len(index) <= length, (len(index), length)
        return self._replace(index=F.pad(index, (0, max(0, length - len(index))), value=-1))

    def split(self, rows, size):
        """The part of a whole batch that belongs to rows (a slice), as a list of pieces of `size`
        rows. All pieces have an index of the same length at every step, where `most` tells what
        they can have: the strata and their order are fixed, so that is hardly more than the mean.
        """
        parts = [] if self.most is None else self.most.split(size)
        length = math.ceil(max((part.sum().item() for part in parts), default=0))
        starts = range(rows.start, rows.stop, size)
        whole = self._replace(most=None)
        pieces = [whole.each(lambda part, i=i: part[i : i + size]) for i in starts]
        return pieces if self.noise is not None else [piece.indexed(length) for piece in pieces]

    def to(self, device):
        """On the device, with its index."""
        whole = self if self.index is not None or self.noise is not None else self.indexed()
        return whole.each(lambda part: runtime.move(part, device))


@torch.no_grad()
def loss_per_pass(loss, x0, corruptions, rows_at_once):
    """loss(x0 (b, L), Corruption) of all rows x0 (R, L) under each of the corruptions: (R, passes)
    nats per token."""
    passes = []
    for whole in corruptions:
        pieces = whole.split(slice(0, len(x0)), rows_at_once)
        found = [loss(*batch).cpu() for batch in zip(x0.split(rows_at_once), pieces)]
        passes.append(torch.cat(found))
    return torch.stack(passes, 1)
