"""The network: one bidirectional transformer, without a word about losses or sampling.

It maps token ids to logits over the real tokens. Who may look at whom is an argument, not a
subclass. What it shares with GPT: pre-norm blocks, attention, MLP. What differs: no causal mask by
default, and optionally it is told how noisy its input is. The shape is the micro-dLLM's: RMSNorm
without weights, rotary positions (RoPE, arXiv:2104.09864), normalised queries and keys (QK-norm,
arXiv:2010.04245), MLP with ReLU^2 (arXiv:2109.08668) and expansion 4, no biases.

Notation, the same in every file: B rows, L positions, C = n_embd channels, H heads, V real tokens
(ids 0..V-1), the MASK token is id V, and cfg's `vocab_size` = V + 1 counts it.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils.attention import attend


def norm(x):
    """RMSNorm (arXiv:1910.07467) without a learned gain."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_table(positions, head_dim, base):
    """cos and sin of the rotary angles, (..., L, 1, head_dim) fp32, for integer positions (..., L):
    once for each channel of a pair, the sine with the sign that `rotate` needs."""
    frequency = base ** (
        -torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    )
    angle = positions.float()[..., None, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)


def rotate(x, cos, sin):
    """Turn channel pairs (i, i + D/2) of x (B, L, H, D) by their position's angles, cos and sin
    (..., L, 1, D)."""
    swapped = torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)
    return (x * cos + swapped * sin).to(x.dtype)


def selected(x, select):
    """x (B, L, C) at the flat positions select (N,), (N, C); all of it where that is None."""
    return x if select is None else x.flatten(0, 1)[select]


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        # three matrices, not one fused: Muon orthogonalises each on its own
        self.q = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.k = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.v = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x, cos, sin, attention, cache, select=None):
        B, L, C = x.shape
        q, k, v = (linear(x).view(B, L, self.n_head, -1) for linear in (self.q, self.k, self.v))
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        if cache is not None:
            k, v = cache(k, v)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = attend(q, k, v, attention)
        return self.proj(selected(y.transpose(1, 2).reshape(B, L, C), select))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.fc = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=False)
        self.proj = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.attn, self.mlp = Attention(cfg), MLP(cfg)
        self.dropout = nn.Dropout(cfg.dropout)
        # adaLN (arXiv:2212.09748): the noise level shifts and scales the input of both sublayers
        self.modulation = (
            nn.Linear(cfg.n_embd, 4 * cfg.n_embd) if cfg.time_conditioning == "adaln" else None
        )

    def forward(self, x, cos, sin, attention, condition, cache, select=None):
        read1 = read2 = norm
        if self.modulation is not None:
            shift1, scale1, *second = self.modulation(F.silu(condition)).chunk(4, dim=-1)
            if select is not None:
                second = (selected(part.expand_as(x), select) for part in second)
            shift2, scale2 = second
            read1 = lambda x: norm(x) * (1 + scale1) + shift1
            read2 = lambda x: norm(x) * (1 + scale2) + shift2
        y = self.attn(read1(x), cos, sin, attention, cache, select)
        x = selected(x, select) + self.dropout(y)
        return x + self.dropout(self.mlp(read2(x)))


class NoiseEmbedding(nn.Module):
    """Noise level (...,) in [0, 1] -> (..., C). The level is always the mask ratio, never a time.

    table       the micro-dLLMs' learned Embedding(T + 1, C); row max(1, round(T m)), row 0 only for
                clean text. With more rows than the window has tokens, some rows are hardly trained
    sinusoidal  sines and cosines of 1000 m, then a two-layer MLP; "adaln" uses the same, and feeds
                it to each block
    """

    def __init__(self, cfg):
        super().__init__()
        self.steps = cfg.diffusion_steps if cfg.time_conditioning == "table" else 0
        if self.steps:
            self.table = nn.Embedding(self.steps + 1, cfg.n_embd)
        else:
            self.mlp = nn.Sequential(
                nn.Linear(cfg.n_embd, cfg.n_embd), nn.SiLU(), nn.Linear(cfg.n_embd, cfg.n_embd)
            )

    def forward(self, level):
        if self.steps:
            row = (level * self.steps).round().long()
            return self.table(torch.where(level > 0, row.clamp(min=1), row))
        return self.mlp(waves(level, self.mlp[0].in_features))


def waves(level, width):
    """Sines and cosines of 1000 times the level (...,), at frequencies from 1 to 1/10,000: (...,
    width), width even."""
    frequency = torch.exp(
        -math.log(10_000) * torch.arange(width // 2, device=level.device) / (width // 2 - 1)
    )
    angle = 1000 * level[..., None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def count_parameters(cfg, vocab_size):
    """How many parameters `Transformer(cfg, vocab_size)` has, without making it."""
    C, adaln = cfg.n_embd, cfg.time_conditioning == "adaln"
    noise = {"none": 0, "table": (cfg.diffusion_steps + 1) * C}.get(
        cfg.time_conditioning, 2 * (C * C + C)
    )
    blocks = cfg.n_layer * (12 * C * C + adaln * (4 * C * C + 4 * C))
    told = C * C if cfg.self_conditioning else 0
    return vocab_size * C * (1 if cfg.tie_embeddings else 2) + blocks + noise + told


class Transformer(nn.Module):
    """ids (B, L) -> logits over the V real tokens; see `forward`.

    cfg needs n_layer, n_head, n_embd, dropout, tie_embeddings, init, rope_base, softcap,
    time_conditioning, diffusion_steps, self_conditioning, activation_checkpointing;
    vocab_size = V + 1 counts MASK.
    """

    def __init__(self, cfg, vocab_size):
        super().__init__()
        self.cfg, self.vocab_size = cfg, vocab_size
        self.embedding = nn.Embedding(vocab_size, cfg.n_embd)
        self.noise = None if cfg.time_conditioning == "none" else NoiseEmbedding(cfg)
        self.earlier = (
            nn.Linear(cfg.n_embd, cfg.n_embd, bias=False) if cfg.self_conditioning else None
        )
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.head = nn.Linear(cfg.n_embd, vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.dropout = nn.Dropout(cfg.dropout)
        self._initialise()

    def _initialise(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        # every block starts as the identity
        if self.cfg.init == "zero":
            for block in self.blocks:
                # uniform of the variance that keeps activations at size 1 (C channels in), as in
                # modded-nanogpt
                for linear in (block.attn.q, block.attn.k, block.attn.v, block.mlp.fc):
                    bound = math.sqrt(3 / linear.in_features)
                    nn.init.uniform_(linear.weight, -bound, bound)
                nn.init.zeros_(block.attn.proj.weight)
                nn.init.zeros_(block.mlp.proj.weight)
            if self.cfg.tie_embeddings:
                # Large, so that what tells one word from another of its kind (Mia from Lily) is not
                # drowned by what the words of a kind learn in common. Copying a name needs the
                # former: on tales, 700 steps that were enough with 0.5 left it unlearned with 0.02.
                # The price: the first loss is above ln V.
                nn.init.normal_(self.embedding.weight, std=0.5)
            else:  # every token starts as equally likely
                nn.init.zeros_(self.head.weight)
        for block in self.blocks:  # no modulation at first
            if block.modulation is not None:
                nn.init.zeros_(block.modulation.weight)
        if self.earlier is not None:  # an earlier prediction is not heard at first
            nn.init.zeros_(self.earlier.weight)

    def forward(
        self,
        ids,
        noise_level=None,
        *,
        attention=None,
        positions=None,
        cache=None,
        select=None,
        prediction=None,
    ):
        """Logits for every position, or for the selected ones.

        ids          (B, L) long, MASK = V where the token is masked
        noise_level  (B,) or (B, L) in [0, 1], the mask ratio; needed if and only if
                     time_conditioning is not "none"
        attention    None (all see all), "causal", a bool tensor (L, L) or (B, 1, L, L), True =
                     row may look at column, or the tiles of one (utils/attention.py)
        positions    (L,) or (B, L) long for the rotary embedding; 0..L-1 by default
        cache        function (layer, k, v) -> (k, v), each (B, l, H, D): stores what is new,
                     returns what to look at (utils/kv_cache.py)
        select       flat indices (N,) into the B * L positions
        prediction   (B, L, C), the `mean_embedding` of what the network predicted before, 0 where
                     it predicted nothing; for networks with self_conditioning. None: all 0
        returns      (B, L, V), or (N, V) with `select`; MASK has no column, so it can never be
                     predicted
        """
        if positions is None:
            positions = torch.arange(ids.size(1), device=ids.device)
        cos, sin = rotary_table(positions, self.cfg.n_embd // self.cfg.n_head, self.cfg.rope_base)
        x = self.embedding(ids)
        if prediction is not None:
            x = x + self.earlier(prediction)
        x, condition = self.embed(x, noise_level)
        for layer, block in enumerate(self.blocks):
            # nobody reads what the last block writes at the other positions
            last = (select,) if layer == len(self.blocks) - 1 else ()
            run = (
                partial(checkpoint, block, use_reentrant=False)
                if self.cfg.activation_checkpointing
                else block
            )
            x = run(x, cos, sin, attention, condition, cache and partial(cache, layer), *last)
        return self.unembed(x)

    def embed(self, x, noise_level):
        """What the first block reads, (B, L, C), and what adaLN is told, (B, 1 or L, C) or None."""
        condition = None
        if self.noise is not None:
            if noise_level is None:
                raise ValueError(
                    f"time_conditioning={self.cfg.time_conditioning} needs noise_level"
                )
            condition = self.noise(noise_level.float())
            condition = condition if condition.dim() == 3 else condition[:, None]
            if self.cfg.time_conditioning != "adaln":
                x = x + condition
        return self.dropout(norm(x)), condition

    def unembed(self, x):
        """Logits of what the last block wrote."""
        # cut after the product: a GPU is fast where the width is round, and it is vocab_size that
        # users choose
        logits = F.linear(norm(x), self.head.weight)[..., :-1]
        return (
            self.cfg.softcap * torch.tanh(logits.float() / self.cfg.softcap)
            if self.cfg.softcap
            else logits
        )

    def mean_embedding(self, logits):
        """What a prediction, logits (..., V), looks like as an input (..., C): the mean embedding
        of a token, normalised (Analog Bits, arXiv:2208.04202, for tokens)."""
        weight = self.embedding.weight[:-1]
        return norm(logits.to(weight.dtype).softmax(-1) @ weight)

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())
