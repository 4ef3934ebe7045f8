"""The final metrics block: numbers about a trained model, each with its unit, and how they are shown."""
import math

import torch

import diffusion
from utils import corpus, tales


def held_out(model, cfg, data, device):
    """Held-out bound of `model` on the first cfg.final_rows held-out rows, in every unit (dict of floats).

    `<|endoftext|>` counts in nats and not in characters: a model also has to say where a text ends. On tales the
    exact -log_prob of the same stories stands beside the bound.
    """
    rows, lengths = data.held_out[: cfg.final_rows].to(device), data.lengths[: cfg.final_rows]
    nll = diffusion.nll_bound(model, rows, cfg.final_masks, diffusion.given_tokens(cfg))
    mean, se_rows, se_masks = diffusion.mean_and_errors(nll)
    nats = mean * rows.numel()
    report = {"bound_nats_per_token": mean, "bound_se_rows": se_rows, "bound_se_masks": se_masks,
              "bound_bits_per_character": nats / math.log(2) / lengths[:, 0].sum().item(),
              "bound_bits_per_byte": nats / math.log(2) / lengths[:, 1].sum().item(),
              "held_out_rows": len(rows), "masks_a_row": cfg.final_masks}
    if cfg.data == "tales":
        exact = -sum(map(tales.log_prob, corpus.tales_held_out(cfg)[: len(rows)])) / len(rows)
        report |= {"bound_nats_per_story": mean * cfg.block_size, "exact_nats_per_story": exact,
                   "excess_over_exact": mean * cfg.block_size / exact - 1, "entropy_nats_per_story": tales.entropy()}
    return report


def judge_tales(texts):
    """What the grammar says of sampled stories (list of str): shares in [0, 1], and nats.

    valid        whole stories of the grammar       grammatical  sentences that the grammar has
    agreeing     sentences that also fit the story so far
    distinct     different texts                    log_prob     mean exact log-probability of the valid ones;
                                                                 against -entropy: lower is broken, higher collapsed
    """
    log_probs = [p for text in texts if (p := tales.log_prob(text)) > -math.inf]
    verdicts = [verdict for text in texts for verdict in tales.judge(text)]
    return {"samples": len(texts), "valid": len(log_probs) / len(texts),
            "grammatical": sum(v != "ungrammatical" for v in verdicts) / len(verdicts),
            "agreeing": sum(v == "ok" for v in verdicts) / len(verdicts),
            "distinct": len(set(texts)) / len(texts),
            "log_prob": sum(log_probs) / len(log_probs) if log_probs else None}


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
            known = _run_hashes(training, n).flatten().unique()
            found = torch.isin(_run_hashes(rows[here], n), known).any(1)
            low[here[found]], high[here[~found]] = n, n - 1
    return low


def _run_hashes(rows, n):
    """Hash of every run of n tokens of rows (R, L): (R, L - n + 1), 64-bit integers that wrap around."""
    total = torch.zeros(rows.size(0), rows.size(1) - n + 1, dtype=torch.long)
    for i in range(n):
        total = total * 6364136223846793005 + rows[:, i:i + total.size(1)] + 1
    return total


def show(report):
    """The report (dict) as lines of text."""
    lines = ["final metrics"]
    for key, value in report.items():
        lines.append(f"  {key:<26} " + (f"{value:.4f}" if isinstance(value, float) else f"{value}"))
    return "\n".join(lines)
