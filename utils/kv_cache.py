"""Keys and values that are kept while a text is generated: exact, and approximate.

Both are networks of a `denoisers.Denoiser`, and both hand their method `keep` to the transformer,
which calls it in each layer. `columns` are then the positions (b, l) that the call computes.
"""

import torch

from utils import blocks, self_conditioning


def of_rows(kept, rows):
    """What is kept (B, ...) of the rows (b,), in ascending order; of all, without a copy."""
    return kept if len(rows) == len(kept) else kept[rows]


class Exact:
    """For models that see nothing to the right of what they generate: what is finished never
    changes.

    A call computes what was not kept yet and the block that is being denoised: the finished block
    before it goes through the network once more, clean, together with the next one's first step
    (BD3-LM's merged pass, arXiv:2503.09573).

    rows       of the canvas
    block_len  of the model; 1 for an autoregressive one
    bos        tokens at the start of a row that are in no block
    levels     function (x (b, W), `Window`) -> noise levels (b, W) that the network is told
    shifted    position i reads token i - 1
    causal     what is finished was seen from left to right, not in blocks
    begin      the first position that others may look at
    """

    nfe_a_row = 1

    def __init__(self, model, canvas, block_len, bos, levels, shifted=False, causal=False, begin=0):
        self.model, self.mask, self.levels = model, model.vocab_size - 1, levels
        self.block_len, self.bos, self.shifted = block_len, bos, shifted
        self.causal, self.begin = causal, begin
        self.layers, self.nfe = {}, 0
        self.kept = canvas.new_zeros(len(canvas))  # positions, from the first
        self.shift = torch.zeros_like(self.kept)  # of the window that they were computed in
        self.rows = self.columns = self.width = None  # what the network is computing now

    def __call__(self, x, asked, window):
        rows, start, shift, W = window.rows, window.start[:, 0], window.shift[:, 0], x.size(1)
        # a block may be asked again when it is full, by policies that remask
        kept = self.kept[rows].minimum(start)
        self.kept[rows] = torch.where(self.shift[rows] == shift, kept, 0)
        self.shift[rows] = shift
        end = (start + self.block_len).clamp(max=W)
        length = int((end - self.kept[rows]).max())
        self.columns = (end - length).clamp(min=0)[:, None] + torch.arange(length, device=x.device)
        self.rows, self.width = rows, max(int(end.max()), int(self.columns.max()) + 1)
        index = asked.gather(1, self.columns).flatten().nonzero()[:, 0]
        ids = (blocks.shifted(x, self.mask) if self.shifted else x).gather(1, self.columns)
        first = window.start if self.causal else None
        logits = self.model(
            ids,
            self.levels(x, window).gather(1, self.columns),
            positions=self.columns,
            select=index,
            attention=blocks.sight(
                self.columns, self.width, self.block_len, self.bos, first, self.begin
            ),
            cache=self.keep,
            **self_conditioning.shown(window.earlier, self.columns),
        )
        self.kept[rows] = end if self.shifted else start
        self.nfe += 1
        return logits

    def keep(self, layer, k, v):
        """Store the new keys and values (b, l, H, D) of `layer`; returns those of all positions so
        far."""
        if layer not in self.layers:
            self.layers[layer] = tuple(x.new_zeros(len(self.kept), 0, *x.shape[2:]) for x in (k, v))
        missing = self.width - self.layers[layer][0].size(1)
        if missing > 0:
            self.layers[layer] = tuple(
                torch.cat((old, old.new_zeros(len(old), missing, *old.shape[2:])), 1)
                for old in self.layers[layer]
            )
        for old, new in zip(self.layers[layer], (k, v)):
            old[self.rows[:, None], self.columns] = new
        return tuple(of_rows(old, self.rows)[:, : self.width] for old in self.layers[layer])


class Approximate:
    """For models that see all (Fast-dLLM, arXiv:2505.22618): what is kept from a block's first step
    on does not see the tokens that were unmasked since.

    rows       of the canvas
    block_len  of the blocks that are decoded
    how        SampleConfig. cache prefix: what is before the block is kept, the block and all after
               it are computed; dual: what is around the block is kept, only the block is computed.
               cache_refresh: compute everything anew every so many steps of a block (0: in its
               first step only)
    """

    nfe_a_row = 1

    def __init__(self, model, rows, block_len, how):
        self.model, self.kind, self.num_rows = model, how.cache, rows
        self.block_len, self.refresh = block_len, how.cache_refresh
        self.layers, self.nfe = {}, 0
        self.rows = self.columns = self.start = None  # what the network is computing now
        # of each row: the block and the step of it that everything was computed for
        self.block = self.since = None

    def __call__(self, x, asked, window):
        W, rows, start = x.size(1), window.rows, window.start
        block, done = window.turn.block[rows], window.turn.done[rows]
        ratio, owner = (x == self.model.vocab_size - 1).float().mean(1), asked.nonzero()[:, 0]
        if self.block is None:
            self.block = torch.full((self.num_rows,), -1, device=x.device)
            self.since = torch.zeros_like(self.block)
        anew = self.block[rows] != block
        if self.refresh:
            anew |= done - self.since[rows] >= self.refresh
        self.block[rows] = block
        self.since[rows] = torch.where(anew, done, self.since[rows])
        logits = None
        for part, whole in ((anew, True), (~anew, False)):
            some = part.nonzero()[:, 0]
            if not len(some):
                continue
            columns = self.computed(start[some], W, whole).expand(len(some), -1)
            self.rows = rows[some]
            self.columns = None if whole else columns
            self.start = start[some]
            self.nfe += 1
            index = asked[some].gather(1, columns).flatten().nonzero()[:, 0]
            earlier = window.earlier if window.earlier is None else window.earlier[some]
            found = self.model(
                x[some].gather(1, columns),
                ratio[some],
                positions=columns,
                select=index,
                cache=self.keep,
                **self_conditioning.shown(earlier, columns),
            )
            logits = found.new_empty(len(owner), found.size(1)) if logits is None else logits
            logits[part[owner]] = found
        return logits

    def computed(self, start, W, whole):
        """Positions (b or 1, l) of a window of W that are computed for blocks from start (b, 1)."""
        place = torch.arange(W, device=start.device)
        if whole:
            return place[None]
        if self.kind == "prefix":
            return place[None, int(start.min()) :]
        length = min(self.block_len, W)
        return start.clamp(max=W - length) + place[:length]

    def keep(self, layer, k, v):
        """Store the new keys and values (b, l, H, D) of `layer`; returns those to look at,
        (b, W, H, D)."""
        if self.columns is None:
            if layer not in self.layers:
                self.layers[layer] = tuple(x.new_zeros(self.num_rows, *x.shape[1:]) for x in (k, v))
            for old, new in zip(self.layers[layer], (k, v)):
                old[self.rows] = new
            return k, v
        place = self.rows[:, None], self.columns
        # a row keeps what is before its own block, whatever the batch
        ahead = (self.columns >= self.start)[..., None, None]
        for old, new in zip(self.layers[layer], (k, v)):
            old[place] = torch.where(ahead, new, old[place])
        return tuple(of_rows(old, self.rows) for old in self.layers[layer])
