"""Blocks: who sees whom in block diffusion, and the keys and values that are kept while a text is written."""
from functools import lru_cache

import torch


# --- block diffusion: who sees whom, at which noise level --------------------------------------------------------


def number(L, block_len, given, device):
    """Which block each of L positions belongs to, (L,) long: 0, 1, ..., and -1 for the `given` first ones."""
    return (torch.arange(L, device=device) - given).div(block_len, rounding_mode="floor").clamp(min=-1)


def level(hidden, block_len, given):
    """Share of hidden (B, L) bool positions in the block of each position: (B, L) float32, 0 for the `given` ones."""
    own = number(hidden.size(1), block_len, given, hidden.device) + 1
    size = torch.bincount(own, minlength=1)
    count = torch.zeros(len(hidden), len(size), device=hidden.device).index_add(1, own, hidden.float())
    return (count / size.clamp(min=1))[:, own]


@lru_cache(maxsize=8)
def doubled_mask(L, block_len, given, device):
    """Who looks at whom in training on [corrupted ; clean], (2L, 2L) bool, rows look at columns (BD3-LM, arXiv:2503.09573,
    section 3.1): corrupted tokens at their own corrupted block and the clean ones before it, clean tokens at their own
    clean block and those before it; nothing clean at anything corrupted."""
    own = number(L, block_len, given, device)
    same, before = own[:, None] == own, own[:, None] > own
    return torch.cat((torch.cat((same, before), 1), torch.cat((torch.zeros_like(same), same | before), 1)))


def shifted(ids, mask):
    """ids (B, L) one to the right, MASK at the beginning: what an autoregressive network reads."""
    return torch.cat((torch.full_like(ids[:, :1], mask), ids[:, :-1]), 1)


# --- what is kept while a text is written -------------------------------------------------------------------------


class Exact:
    """Keys and values of models that see nothing to the right of what they write: what is finished never changes.

    A call computes what was not kept yet and the block that is being written: the finished block before it goes through
    the network once more, clean, together with the next one's first step (BD3-LM's merged pass).

    rows       of the canvas
    block_len  of the model; 1 for ar
    ar         autoregressive: position i reads token i - 1
    """

    def __init__(self, rows, block_len, given, ar, device):
        self.block_len, self.given, self.ar, self.layers, self.calls = block_len, given, ar, {}, 0
        self.kept = torch.zeros(rows, dtype=torch.long, device=device)  # positions, from the first on
        self.shift = torch.zeros_like(self.kept)  # of the window that they were computed in
        self.rows = self.columns = self.width = None  # what the network is computing now

    def logits(self, model, x, asked, rows, start, shift):
        """Logits (N, V) at the asked (b, W) positions of x (b, W), the rows (b,) of the canvas, in a window that is shift
        (b,) into it; start (b,) is the first position of each row's block in the window."""
        W = x.size(1)
        self.kept[rows] = torch.where(self.shift[rows] == shift, self.kept[rows], 0)
        self.shift[rows] = shift
        end = (start + self.block_len).clamp(max=W)
        length = int((end - self.kept[rows]).max())
        self.columns = (end - length).clamp(min=0)[:, None] + torch.arange(length, device=x.device)
        self.rows, self.width = rows, max(int(end.max()), int(self.columns.max()) + 1)
        own = number(self.width, self.block_len, self.given, x.device)
        share = level(x == model.vocab_size - 1, self.block_len, self.given)
        index = asked.gather(1, self.columns).flatten().nonzero()[:, 0]
        ids = (shifted(x, model.vocab_size - 1) if self.ar else x).gather(1, self.columns)
        logits = model(ids, share.gather(1, self.columns), positions=self.columns, select=index, cache=self,
                       attention=(own <= own[self.columns][..., None])[:, None])
        self.kept[rows] = end if self.ar else start
        self.calls += 1
        return logits

    def __call__(self, layer, k, v):
        """Store the new keys and values (b, l, H, D) of `layer`; returns those of all positions so far."""
        if layer not in self.layers:
            self.layers[layer] = tuple(x.new_zeros(len(self.kept), 0, *x.shape[2:]) for x in (k, v))
        missing = self.width - self.layers[layer][0].size(1)
        if missing > 0:
            self.layers[layer] = tuple(torch.cat((old, old.new_zeros(len(old), missing, *old.shape[2:])), 1)
                                       for old in self.layers[layer])
        for old, new in zip(self.layers[layer], (k, v)):
            old[self.rows[:, None], self.columns] = new
        return tuple(old[self.rows, :self.width] for old in self.layers[layer])


class Cache:
    """Keys and values of the rows of a canvas, layer by layer, for models that see all. Approximate: what was kept does
    not see the tokens that were written after it (Fast-dLLM, arXiv:2505.22618).

    kind     "prefix": kept before the block, the block and all after it are computed in each step
             "dual": kept around the block, only the block is computed
    rows     of the canvas
    refresh  compute everything anew every so many steps of a block (0: in its first step only)
    """

    def __init__(self, kind, rows, refresh=0):
        self.kind, self.num_rows, self.refresh, self.layers = kind, rows, refresh, {}
        self.rows = self.columns = self.start = None  # what the network is computing now
        self.block = self.since = None  # of each row: the block and the step of it that everything was computed for
        self.calls = 0  # of the network

    def logits(self, model, x, asked, rows, start, length, block, k):
        """Logits (N, V) at the asked (b, W) positions of x (b, W), the rows (b,) of the canvas.

        start (b, 1): first position of each row's block, length: its positions, block (b,): its number, k (b,): steps
        done in it.
        """
        W, mask = x.size(1), model.vocab_size - 1
        level, owner = (x == mask).float().mean(1), asked.nonzero()[:, 0]
        if self.block is None:
            self.block = torch.full((self.num_rows,), -1, device=x.device)
            self.since = torch.zeros_like(self.block)
        anew = self.block[rows] != block
        if self.refresh:
            anew |= k - self.since[rows] >= self.refresh
        self.block[rows] = block
        self.since[rows] = torch.where(anew, k, self.since[rows])
        logits = None
        for part, whole in ((anew, True), (~anew, False)):
            here = part.nonzero()[:, 0]
            if not len(here):
                continue
            if whole:
                columns = torch.arange(W, device=x.device)
            elif self.kind == "prefix":
                columns = torch.arange(int(start[here].min()), W, device=x.device)
            else:
                columns = start[here].clamp(max=W - min(length, W)) + torch.arange(min(length, W), device=x.device)
            columns = columns.expand(len(here), -1)
            self.rows, self.columns, self.start = rows[here], None if whole else columns, start[here]
            self.calls += 1
            index = asked[here].gather(1, columns).flatten().nonzero()[:, 0]
            found = model(x[here].gather(1, columns), level[here], positions=columns, select=index, cache=self)
            logits = found.new_empty(len(owner), found.size(1)) if logits is None else logits
            logits[part[owner]] = found
        return logits

    def __call__(self, layer, k, v):
        """Store the new keys and values (b, l, H, D) of `layer`; returns those to look at, (b, W, H, D)."""
        if self.columns is None:
            if layer not in self.layers:
                self.layers[layer] = tuple(x.new_zeros(self.num_rows, *x.shape[1:]) for x in (k, v))
            for old, new in zip(self.layers[layer], (k, v)):
                old[self.rows] = new
            return k, v
        place, own = (self.rows[:, None], self.columns), (self.columns >= self.start)[..., None, None]
        for old, new in zip(self.layers[layer], (k, v)):  # a row keeps what is before its own block, whatever the batch
            old[place] = torch.where(own, new, old[place])
        all_rows = len(self.rows) == self.num_rows
        return tuple(old if all_rows else old[self.rows] for old in self.layers[layer])
