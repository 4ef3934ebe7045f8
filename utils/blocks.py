"""Keys and values that a full-attention model keeps while it writes block by block.

Approximate: what was kept does not see the tokens that were written after it (Fast-dLLM, arXiv:2505.22618).
"""
import torch


class Cache:
    """Keys and values of the rows of a canvas, layer by layer.

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
