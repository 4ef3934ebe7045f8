"""The final metrics block: numbers about a trained model, each with its unit, and how they are shown."""
import math
from collections import Counter

import torch

import diffusion
from utils import canvas, corpus, tales


def held_out(model, cfg, data, device):
    """Held-out bound of `model` on the first cfg.final_rows held-out rows, in every unit (dict of floats).

    `<|endoftext|>` counts in nats and not in characters: a model also has to say where a text ends. On tales the
    exact -log_prob of the same stories stands beside the bound.
    """
    rows = data.held_out[: cfg.final_rows].to(device)
    lengths = corpus.row_lengths(rows, data.text)
    nll = diffusion.nll_bound(model, rows, cfg.final_masks, diffusion.given_tokens(cfg), cfg.micro_batch or 64)
    mean, se_rows, se_masks = diffusion.mean_and_errors(nll)
    nats = mean * rows.numel()
    report = {"bound_nats_per_token": mean, "bound_se_rows": se_rows, "bound_se_masks": se_masks,
              "bound_bits_per_character": nats / math.log(2) / lengths[:, 0].sum().item(),
              "bound_bits_per_byte": nats / math.log(2) / lengths[:, 1].sum().item(),
              "held_out_rows": len(rows), "masks_a_row": cfg.final_masks}
    if cfg.data == "tales" and cfg.rows == "document":
        exact = -sum(map(tales.log_prob, corpus.tales_held_out(cfg)[: len(rows)])) / len(rows)
        report |= {"bound_nats_per_story": mean * cfg.block_size, "exact_nats_per_story": exact,
                   "excess_over_exact": mean * cfg.block_size / exact - 1, "entropy_nats_per_story": tales.entropy()}
    return report


def sample_rows(write, text, cfg, count, device):
    """`count` unconditional samples (count, block_size) with the seeds 0, 1, ..., and how many network evaluations each
    took (count,), both on the CPU.

    write(blank (b, block_size), seeds (list of b)) returns the two for 50 rows at a time.
    """
    parts = []
    for seeds in torch.arange(count).split(50):
        blank = torch.tensor([canvas.build(text, [None], cfg.block_size)] * len(seeds), device=device)
        parts.append([part.cpu() for part in write(blank, seeds.tolist())])
    return tuple(map(torch.cat, zip(*parts)))


def judge_tales(texts):
    """What the grammar says of sampled stories (list of str): shares in [0, 1], and nats.

    valid        whole stories of the grammar       grammatical  sentences that the grammar has
    agreeing     sentences that also fit the story so far
    distinct     different texts                    log_prob     mean exact log-probability of the valid ones;
                                                                 against -entropy: lower is broken, higher collapsed
    """
    log_probs = [p for text in texts if (p := tales.log_prob(text)) > -math.inf]
    verdicts = [verdict for text in texts for verdict in tales.judge(text)]
    count, sentences = max(1, len(texts)), max(1, len(verdicts))
    return {"samples": len(texts), "valid": len(log_probs) / count,
            "grammatical": sum(v != "ungrammatical" for v in verdicts) / sentences,
            "agreeing": sum(v == "ok" for v in verdicts) / sentences,
            "distinct": len(set(texts)) / count,
            "log_prob": sum(log_probs) / len(log_probs) if log_probs else None}


def diversity(texts):
    """How varied sampled texts (list of str) are, in words.

    distinct_2        different pairs of neighbouring words, a share of all pairs
    self_overlap      share of a text's runs of four words that some other text has too, the mean over texts
    unigram_entropy   of the words of all texts together, in nats
    """
    words = [text.split() for text in texts]
    pairs = [pair for w in words for pair in zip(w, w[1:])]
    fours = [set(zip(w, w[1:], w[2:], w[3:])) for w in words]
    owners = Counter(four for own in fours for four in own)
    overlap = [sum(owners[four] > 1 for four in own) / len(own) for own in fours if own]
    counts = Counter(word for w in words for word in w)
    total = max(1, sum(counts.values()))
    return {"distinct_2": len(set(pairs)) / max(1, len(pairs)),
            "self_overlap": sum(overlap) / max(1, len(overlap)),
            "unigram_entropy": -sum(n / total * math.log(n / total) for n in counts.values())}


def longest_copies(rows, training):
    """Longest run of tokens that each of rows (R, L) shares with any of the training rows (N, L): (R,) long.

    Runs are compared by a 64-bit polynomial hash; the length is found by bisection, since a copy of n tokens holds
    one of n - 1.
    """
    low = torch.zeros(len(rows), dtype=torch.long)
    high = torch.full((len(rows),), rows.size(1), dtype=torch.long)
    while (low < high).any():
        middle = (low + high + 1) // 2
        for n in middle[low < high].unique().tolist():
            here = ((low < high) & (middle == n)).nonzero()[:, 0]
            found = _is_shared(_run_hashes(rows[here], n), training, n).any(1)
            low[here[found]], high[here[~found]] = n, n - 1
    return low


def _is_shared(hashes, training, n):
    """Which of `hashes` (of runs of n tokens) occur in the training rows (N, L): bool, of the same shape."""
    wanted = hashes.flatten().unique()
    shared = torch.zeros(len(wanted), dtype=torch.bool)
    for part in training.split(8192):  # few rows are looked for and many looked through, so the few are sorted
        known = _run_hashes(part, n).flatten()
        place = torch.searchsorted(wanted, known).clamp(max=len(wanted) - 1)
        shared[place[wanted[place] == known]] = True
    return shared[torch.searchsorted(wanted, hashes)]


def _run_hashes(rows, n):
    """Hash of every run of n tokens of rows (R, L): (R, L - n + 1), 64-bit integers that wrap around.

    A run of a + b tokens has the hash hash_a * M^b + hash_b, so log2(n) steps are enough.
    """
    size, power, block, total, length = 1, 6364136223846793005, rows.long() + 1, None, 0  # power is M^size
    while True:
        if n & size:
            total = block if total is None else total[:, : block.size(1) - length] * power + block[:, length:]
            length += size
        if length == n:
            return total
        block = block[:, :-size] * power + block[:, size:]
        size, power = 2 * size, power * power % 2**64
        power -= 2**64 * (power >= 2**63)


def show(report):
    """The report (dict) as lines of text."""
    lines = ["final metrics"]
    for key, value in report.items():
        lines.append(f"  {key:<26} " + (f"{value:.4f}" if isinstance(value, float) else f"{value}"))
    return "\n".join(lines)
