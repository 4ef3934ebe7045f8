"""Samples: generated to be judged, and what is said of them: diversity, copies, validity, a judge's
NLL."""

import math
import time
from collections import Counter

import torch

import diffusion
from config import SampleConfig
from utils import canvas, judges, pairs, runtime
from utils import tokenizer as tokenizers
from utils.built_in import BUILT_IN


def canvases(family, tokenizer, count, held_out=None, length=None):
    """Canvases (count, L) long of samples to judge: unconditional ones of that length, or (None)
    the window's; of pairs, the questions of the held-out rows (R, L), one after the other."""
    if family.cfg.rows == "pair":
        rows = held_out[torch.arange(count) % len(held_out)]
        return torch.where(pairs.given(rows, tokenizer), rows, tokenizer.mask)
    blank = canvas.build(tokenizer, [None], length or family.cfg.seq_len)
    return torch.tensor([blank]).repeat(count, 1)


def sample_rows(generate, family, tokenizer, blanks, device):
    """Samples of the canvases blanks (count, L) with the seeds 0, 1, ..., and what else generate
    returns for each (count,), all on the CPU.

    generate(blank (b, L), seeds (list of b)) returns the ids and the rest for 50 rows at a time, or
    as many as fit.
    """
    fit = runtime.rows_that_fit(family, tokenizer.vocab_size, blanks.size(1), device)
    parts = []
    for seeds in torch.arange(len(blanks)).split(min(50, fit)):
        found = generate(blanks[seeds].to(device), seeds.tolist())
        parts.append([part.cpu() for part in found])
    return tuple(map(torch.cat, zip(*parts)))


def generate_rows(model, family, tokenizer, blanks, device, how):
    """(samples of the canvases blanks (count, L) long, figures of how they were generated).

    change_rate  share of the tokens to generate that a step changes, masks or unmasks; under
                 uniform noise the first step shows all, which counts as a change of all
    """
    start = time.perf_counter()

    def generate(blank, seeds):
        changes = torch.zeros(len(blank), device=device)
        for step in diffusion.sample(family, model, blank, how, seeds=seeds):
            changes += (step.fresh | step.remasked).sum(1)
        return step.ids, step.row_nfe, changes / (blank == tokenizer.mask).sum(1)

    rows, nfe, changes = sample_rows(generate, family, tokenizer, blanks, device)
    generated = (blanks == tokenizer.mask).sum().item()
    return rows, {
        "change_rate": (changes / nfe).mean().item(),
        "nfe_a_sample": nfe.float().mean().item(),
        "tokens_per_second": generated / (time.perf_counter() - start),
    }


def solve_puzzles(model, family, tokenizer, puzzles, device, how):
    """What the model makes of puzzles, a list of (text with sudoku.HOLE, solution): a dict of the
    share that it solves, which is all holes right, and the NFE of each."""
    made, cfg = BUILT_IN[family.cfg.data], family.cfg
    asked = (canvas.asked_for(SampleConfig(puzzle=text), cfg)[0] for text, _ in puzzles)
    window = cfg.seq_len
    rows = torch.tensor([canvas.build(tokenizer, parts, window, prompt) for prompt, parts in asked])
    size = runtime.rows_that_fit(family, tokenizer.vocab_size, rows.size(1), device)
    texts, nfe = [], 0
    for seeds in torch.arange(len(rows)).split(size):
        blank = rows[seeds].to(device)
        for step in diffusion.sample(family, model, blank, how, seeds=seeds.tolist()):
            pass
        nfe += step.row_nfe.sum().item()
        texts += [canvas.finished(tokenizer, row) for row in step.ids.tolist()]
    both = zip(texts, puzzles, strict=True)
    right = sum(made.filled(puzzle, text) == solution for text, (puzzle, solution) in both)
    return {
        "puzzles": len(puzzles),
        "puzzles_solved": right / len(puzzles),
        "nfe_a_puzzle": nfe / len(puzzles),
    }


def reference_rows(held_out, tokenizer, count):
    """Up to `count` held-out windows (R, L) that begin as samples do: where there is an
    `<|endoftext|>`, with one."""
    L, flat = held_out.size(1), held_out.flatten()
    # windows do not overlap: text that stands in two would be less varied
    starts, free = [], 0
    if tokenizer.end is not None:
        # an end before an end only fills up a row
        begins = (flat[:-1] == tokenizer.end) & (flat[1:] != tokenizer.end)
        for start in begins[: len(flat) - L + 1].nonzero()[:, 0].tolist():
            if start >= free:
                starts, free = [*starts, start], start + L
    # of few documents, how much text there is matters more
    if not starts or len(starts) < min(count, len(held_out) // 2):
        return held_out[:count]
    return torch.stack([flat[start : start + L] for start in starts[:count]])


def judge_rows(rows, *, tokenizer, cfg, training, judge):
    """Figures (dict) of samples or real text, rows (R, L) long: diversity, copies from the
    `training` rows (N, L), what is known of a built-in corpus, and what the judge says
    (`judges.score`)."""
    between = f"\n{tokenizers.END}\n"  # documents of a stream
    texts = [
        canvas.finished(tokenizer, row, stop=cfg.rows != "stream").replace(between, "\n")
        for row in rows.tolist()
    ]
    report = {"texts": len(texts)} | diversity(texts)
    if training is not None:
        own = without_filling(rows, tokenizer, cfg)
        copies = longest_copies(own, training)
        report |= {
            "longest_copy_mean": copies.float().mean().item(),
            "longest_copy_max": copies.max().item(),
            "shared_8_grams": shared_runs(own, training, 8),
        }
    if cfg.data in BUILT_IN:
        found = (
            pairs.of_rows(rows, tokenizer)
            if cfg.rows == "pair"
            else [d for row in rows.tolist() for d in canvas.documents(tokenizer, row, cfg.rows)]
        )
        report |= BUILT_IN[cfg.data].figures(found)
    if judge:
        report |= judges.score(texts, judge)
    return report


def without_filling(rows, tokenizer, cfg):
    """rows (R, L) with -1 for the `<|endoftext|>` that fill up what follows the end of a document,
    where a row is one; of pairs also for what is given."""
    rows = rows.clone()
    if cfg.rows != "stream":
        for row in rows:
            row[canvas.end(tokenizer, row.tolist()) + 1 :] = -1
    if cfg.rows == "pair":
        rows[pairs.given(rows, tokenizer)] = -1
    return rows


def diversity(texts):
    """How varied sampled texts (list of str) are, in words.

    distinct_n        different runs of n words, a share of all such runs (n = 1, 2, 3)
    repetition        share of a text's runs of four words that it has had before, the mean over
                      texts
    self_overlap      share of a text's runs of four words that some other text has too, the mean
                      over texts
    unigram_entropy   of the words of all texts together, in nats
    """
    words = [text.split() for text in texts]
    runs = lambda own, n: list(zip(*(own[i:] for i in range(n))))
    distinct = {}
    for n in (1, 2, 3):
        every = [run for own in words for run in runs(own, n)]
        distinct[f"distinct_{n}"] = len(set(every)) / max(1, len(every))
    fours = [runs(own, 4) for own in words if len(own) >= 4]
    owners = Counter(four for own in fours for four in set(own))
    overlap = [sum(owners[four] > 1 for four in set(own)) / len(set(own)) for own in fours]
    repetition = [1 - len(set(own)) / len(own) for own in fours]
    counts = Counter(word for own in words for word in own)
    total = max(1, sum(counts.values()))
    return distinct | {
        "repetition": sum(repetition) / max(1, len(fours)),
        "self_overlap": sum(overlap) / max(1, len(fours)),
        "unigram_entropy": -sum(n / total * math.log(n / total) for n in counts.values()),
    }


def longest_copies(rows, training):
    """Longest run of tokens that each of rows (R, L), -1 where there is none, shares with any of
    the training rows (N, L): (R,) long.

    Runs are compared by a 64-bit polynomial hash; the length is found by bisection, since a copy of
    n tokens holds one of n - 1.
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


def shared_runs(rows, training, n):
    """Share of the runs of n tokens of rows (R, L), -1 where there is none, that the training rows
    (N, L) have too."""
    if rows.size(1) < n or not (whole := (rows.unfold(1, n, 1) >= 0).all(-1)).any():
        return 0.0
    return _is_shared(_run_hashes(rows, n), training, n)[whole].float().mean().item()


def _is_shared(hashes, training, n):
    """Which of `hashes` (of runs of n tokens) occur in the training rows (N, L): bool, of the same
    shape."""
    wanted = hashes.flatten().unique()
    shared = torch.zeros(len(wanted), dtype=torch.bool)
    # few rows are looked for and many looked through, so the few are sorted
    for part in training.split(8192):
        if part.size(1) < n:
            continue
        known = _run_hashes(part, n).flatten()
        place = torch.searchsorted(wanted, known).clamp(max=len(wanted) - 1)
        shared[place[wanted[place] == known]] = True
    return shared[torch.searchsorted(wanted, hashes)]


def _run_hashes(rows, n):
    """Hash of every run of n tokens of rows (R, L): (R, L - n + 1), 64-bit integers that wrap
    around.

    A run of a + b tokens has the hash hash_a * M^b + hash_b, so log2(n) steps are enough.
    """
    size, power, block, total, length = 1, 6364136223846793005, rows.long() + 1, 0, 0
    while True:  # block: hashes of runs of `size`, power: M^size, total: hashes of runs of `length`
        if n & size:
            before = total[:, : block.size(1) - length] if length else total
            total = before * power + block[:, length:]
            length += size
        if length == n:
            return total
        block = block[:, :-size] * power + block[:, size:]
        size, power = 2 * size, power * power % 2**64
        power -= 2**64 * (power >= 2**63)
