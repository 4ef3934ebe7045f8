"""The final metrics block: numbers about a trained model, each with its unit, and how they are shown."""
import dataclasses
import math
import statistics
import time
from collections import Counter
from typing import NamedTuple

import torch

import diffusion
from utils import canvas, corpus, families, runtime, tales, tokenizer as tokenizers

SEARCHED = 5_000_000  # training tokens that copies are looked for in


def final(model, family, data, hardware, steps, samples, how, judge=None):
    """The final metrics block but for `held_out` (dict): `levels_of`, and of so many `samples` what `judge_rows` says.

    steps     of the run, which say what it was trained on where that has no end
    how       SampleConfig of the samples
    judge     `Judge` that scores the samples too
    """
    with hardware.autocast():
        report = levels_of(model, family, data, hardware.device)
        if not samples:
            return report
        rows, figures = generate_rows(model, family, data.tokenizer, samples, hardware.device, how)
    searched = data.training(steps, SEARCHED) if data.training else None  # what it was trained on need not be at hand
    rest = dict(tokenizer=data.tokenizer, cfg=family.cfg, training=searched, judge=judge, device=hardware.device)
    return report | {"samples": judge_rows(rows, **rest) | figures,
                     "reference": judge_rows(reference_rows(data.held_out, data.tokenizer, samples), **rest),
                     "copies_looked_for_in_tokens": 0 if searched is None else searched.numel()}


def held_out(model, family, data, device):
    """Held-out bound of `model` on the first cfg.final_rows held-out rows, in every unit (dict of floats).

    `<|endoftext|>` counts in nats and not in characters: a model also has to say where a text ends. On tales the
    exact -log_prob of the same stories stands beside the bound. Of an autoregressive model the "bound" is exact.
    """
    cfg = family.cfg
    rows = data.held_out[: cfg.final_rows].to(device)
    lengths = corpus.row_lengths(rows, data.tokenizer)
    mean, se_rows, se_masks = mean_and_errors(family.nelbo(model, rows, cfg.final_masks, cfg.micro_batch or 64))
    nats, exact = mean * rows.numel(), family.exact
    report = {"bound_nats_per_token": mean, "bound_se_rows": se_rows, "bound_se_masks": 0.0 if exact else se_masks,
              "bound_bits_per_character": nats / math.log(2) / lengths[:, 0].sum().item(),
              "bound_bits_per_byte": nats / math.log(2) / lengths[:, 1].sum().item(),
              "perplexity_of_bound": perplexity(mean), "held_out_rows": len(rows), "masks_a_row": 0 if exact else cfg.final_masks}
    if cfg.data == "tales" and cfg.rows == "document":
        truth = -sum(map(tales.log_prob, corpus.tales_held_out(cfg)[: len(rows)])) / len(rows)
        report |= {"bound_nats_per_story": mean * cfg.seq_len, "exact_nats_per_story": truth,
                   "excess_over_exact": mean * cfg.seq_len / truth - 1, "entropy_nats_per_story": tales.entropy()}
    return report


def mean_and_errors(nll):
    """Mean of nll (R, passes) and its two standard errors, over rows and over masks.

    rows   what another sample of as many held-out rows would change (their own masks included)
    masks  what other masks on the same rows would change; passes are independent, so their spread tells (nan for one)
    """
    R, passes = nll.shape
    rows = nll.mean(1).std().item() / math.sqrt(R) if R > 1 else math.nan
    masks = nll.mean(0).std().item() / math.sqrt(passes) if passes > 1 else math.nan
    return nll.mean().item(), rows, masks


def perplexity(nats):
    """exp, or infinity where that is too large a number."""
    return math.exp(nats) if nats < 700 else math.inf


LEVELS = 10


@torch.no_grad()
def levels_of(model, family, data, device):
    """What the network knows of masked tokens at each noise level, on the held-out rows of `held_out`: {"levels": list of
    dicts of loss (nats), entropy of its distribution (nats), accuracy of its likeliest token}, and their means.

    At what is corrupted as the family's `probes` say. For masks also the sources' "perplexity", the exponential of the mean
    cross entropy of all masked tokens under the training schedule: no likelihood, and another number with every schedule.
    """
    rows, generator = data.held_out[: family.cfg.final_rows].to(device), torch.Generator().manual_seed(0)
    levels, losses = {}, torch.full(rows.shape, math.nan)
    for level, corruption in family.probes(model, rows.shape, LEVELS, generator):
        found = _look(model, family, rows, corruption)
        levels[level] = _means(level, found)  # few masks have few ratios
        losses = torch.where(found[0].isnan(), losses, found[0])
    report = {"levels": list(levels.values()), "accuracy": statistics.fmean(entry["accuracy"] for entry in levels.values()),
              "entropy": statistics.fmean(entry["entropy"] for entry in levels.values())}
    if family.exact:
        report["nats_per_token_but_the_first"] = losses[:, 1:].nanmean().item()
    elif isinstance(family, diffusion.Masked):
        mean = pooled_ce(model, family.cfg, rows, generator)
        report |= {"masked_ce_pooled": mean, "exp_of_masked_ce_schedule_dependent": perplexity(mean)}
    return report


def pooled_ce(model, cfg, rows, generator):
    """Mean cross entropy, in nats, of all tokens of rows (R, L) that are masked under the training schedule."""
    family = families.family_of(dataclasses.replace(cfg, loss_weighting="pooled", time_sampling="uniform", complementary=False))
    losses = []
    for part in rows.split(cfg.micro_batch or 64):
        corruption = family.corrupt(part.shape, generator).to(rows.device)
        counts = corruption.masked.sum().item()
        losses.append((family.loss(model, part, corruption).mean().item() * counts, counts))
    return sum(loss for loss, _ in losses) / max(1, sum(count for _, count in losses))


def _look(model, family, rows, corruption):
    """(loss, entropy, 1.0 where the likeliest token is right), each (R, L) with nan where rows (R, L) are not corrupted, on the
    CPU."""
    out, size = torch.full((3, *rows.shape), math.nan), family.cfg.micro_batch or 64
    for number, (x0, piece) in enumerate(zip(rows.split(size), corruption.split(slice(0, len(rows)), size))):
        index = piece.masked.flatten().nonzero()[:, 0]
        log_p = family.log_p(model, x0, piece.to(rows.device), index.to(rows.device))
        target = x0.flatten()[index.to(rows.device)]
        figures = torch.stack((-log_p.gather(1, target[:, None])[:, 0], torch.special.entr(log_p.exp()).sum(-1),
                               (log_p.argmax(-1) == target).float()))
        part = slice(number * size, number * size + len(x0))
        out[:, part] = out[:, part].flatten(1).index_copy(1, index, figures.float().cpu()).view(3, *x0.shape)
    return out


def _means(level, found):
    return {"level": level} | {name: part.nanmean().item() for name, part in zip(("loss", "entropy", "accuracy"), found)}


@torch.no_grad()
def left_to_right(model, family, rows):
    """-log p of rows (R, L) when the network generates them from left to right, one token at a time: (R,) nats per token.
    The exact likelihood of a sampler that does; of an autoregressive network, its likelihood. Not for uniform noise."""
    L, out, at_once = rows.size(1), [], family.cfg.micro_batch or 64
    for row in rows:
        canvases = row.expand(L - family.bos, L).clone()
        places = torch.arange(family.bos, L, device=rows.device)
        canvases[torch.arange(L, device=rows.device) >= places[:, None]] = model.vocab_size - 1
        total = 0.0
        for part in torch.arange(L - family.bos, device=rows.device).split(at_once):
            index = torch.arange(len(part), device=rows.device) * L + places[part]
            logits = family.logits(model, canvases[part], index)
            total += diffusion.token_nll(logits, row[places[part]]).sum().item()
        out.append(total / L)
    return torch.tensor(out)


# --- samples --------------------------------------------------------------------------------------


def sample_rows(generate, family, tokenizer, count, device):
    """`count` unconditional samples (count, seq_len) with the seeds 0, 1, ..., and what else generate returns for each
    (count,), all on the CPU.

    generate(blank (b, seq_len), seeds (list of b)) returns the ids and the rest for 50 rows at a time, or as many as fit.
    """
    parts, window = [], family.cfg.seq_len
    for seeds in torch.arange(count).split(min(50, runtime.rows_at_once(family, tokenizer.vocab_size, window, device))):
        blank = torch.tensor([canvas.build(tokenizer, [None], window)] * len(seeds), device=device)
        parts.append([part.cpu() for part in generate(blank, seeds.tolist())])
    return tuple(map(torch.cat, zip(*parts)))


def generate_rows(model, family, tokenizer, count, device, how):
    """(`count` unconditional samples (count, seq_len) long, figures of how they were written).

    change_rate  share of the tokens to generate that a step changes, masks or unmasks; under uniform noise the first step shows
                 all, which counts as a change of all
    """
    start = time.perf_counter()

    def generate(blank, seeds):
        changes = torch.zeros(len(blank), device=device)
        for step in diffusion.sample(family, model, blank, how, seeds=seeds):
            changes += (step.fresh | step.remasked).sum(1)
        return step.ids, step.row_nfe, changes / (blank == tokenizer.mask).sum(1)
    rows, nfe, changes = sample_rows(generate, family, tokenizer, count, device)
    generated = count * canvas.build(tokenizer, [None], family.cfg.seq_len).count(tokenizer.mask)
    return rows, {"change_rate": (changes / nfe).mean().item(), "evaluations_a_sample": nfe.float().mean().item(),
                  "tokens_per_second": generated / (time.perf_counter() - start)}


def reference_rows(held_out, tokenizer, count):
    """Up to `count` held-out windows (R, L) that begin as samples do: where there is an `<|endoftext|>`, with one."""
    L, flat = held_out.size(1), held_out.flatten()
    starts, free = [], 0  # that do not overlap: text that stands in two windows would be less varied
    if tokenizer.end is not None:
        begins = (flat[:-1] == tokenizer.end) & (flat[1:] != tokenizer.end)  # and not what fills up a row
        for start in begins[: len(flat) - L + 1].nonzero()[:, 0].tolist():
            if start >= free:
                starts, free = [*starts, start], start + L
    if len(starts) < min(count, len(held_out) // 2):  # few documents: how much text there is matters more
        return held_out[:count]
    return torch.stack([flat[start:start + L] for start in starts[:count]]) if starts else held_out[:count]


def judge_rows(rows, *, tokenizer, cfg, training, judge, device):
    """Figures (dict) of samples or real text, rows (R, L) long: diversity, copies from the `training` rows (N, L), validity
    on tales, and the judge's nats per character."""
    between = f"\n{tokenizers.END}\n"  # documents of a stream
    texts = [canvas.finished(tokenizer, row, stop=cfg.rows == "document").replace(between, "\n") for row in rows.tolist()]
    report = {"texts": len(texts)} | diversity(texts)
    if training is not None:
        own = without_filling(rows, tokenizer, cfg)
        copies = longest_copies(own, training)
        report |= {"longest_copy_mean": copies.float().mean().item(), "longest_copy_max": copies.max().item(),
                   "shared_8_grams": shared_runs(own, training, 8)}
    if cfg.data == "tales":
        report |= judge_tales([story for row in rows.tolist() for story in canvas.documents(tokenizer, row, cfg.rows)])
    if judge:
        report["judge_nats_per_character"] = judge_texts(texts, judge, device)
    return report


def without_filling(rows, tokenizer, cfg):
    """rows (R, L) with -1 for the `<|endoftext|>` that fill up what follows the end of a document, where a row is one."""
    rows = rows.clone()
    if cfg.rows == "document":
        for row in rows:
            row[canvas.end(tokenizer, row.tolist()) + 1:] = -1
    return rows


class Judge(NamedTuple):
    """An autoregressive checkpoint that scores texts."""
    model: torch.nn.Module
    family: object
    tokenizer: tokenizers.Tokenizer
    dtype: torch.dtype


@torch.no_grad()
def judge_texts(texts, judge, device):
    """Nats per character of texts (list of str) under an autoregressive model: generative NLL. Texts are cut in windows."""
    model, family, tokenizer, dtype = judge
    total, characters, window = 0.0, 0, family.cfg.seq_len
    begin = [] if tokenizer.end is None else [tokenizer.end]
    for ids in tokenizer.encode([t for t in texts if t], "the samples"):
        for start in range(0, len(ids), window - len(begin)):
            piece = begin + ids[start:start + window - len(begin)]
            row = torch.tensor([piece], device=device)
            index = torch.arange(len(begin), len(piece), device=device)
            with runtime.autocast(device, dtype):
                logits = family.logits(model, row, index)
            total += diffusion.token_nll(logits, row[0, index]).sum().item()
            characters += len(tokenizer.decode(piece[len(begin):]))
    return total / max(1, characters)


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

    distinct_n        different runs of n words, a share of all such runs (n = 1, 2, 3)
    repetition        share of a text's runs of four words that it has had before, the mean over texts
    self_overlap      share of a text's runs of four words that some other text has too, the mean over texts
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
    return distinct | {"repetition": sum(repetition) / max(1, len(fours)), "self_overlap": sum(overlap) / max(1, len(fours)),
                       "unigram_entropy": -sum(n / total * math.log(n / total) for n in counts.values())}


def longest_copies(rows, training):
    """Longest run of tokens that each of rows (R, L), -1 where there is none, shares with any of the training rows (N, L):
    (R,) long.

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


def shared_runs(rows, training, n):
    """Share of the runs of n tokens of rows (R, L), -1 where there is none, that the training rows (N, L) have too."""
    if rows.size(1) < n or not (whole := (rows.unfold(1, n, 1) >= 0).all(-1)).any():
        return 0.0
    return _is_shared(_run_hashes(rows, n), training, n)[whole].float().mean().item()


def _is_shared(hashes, training, n):
    """Which of `hashes` (of runs of n tokens) occur in the training rows (N, L): bool, of the same shape."""
    wanted = hashes.flatten().unique()
    shared = torch.zeros(len(wanted), dtype=torch.bool)
    for part in training.split(8192):  # few rows are looked for and many looked through, so the few are sorted
        if part.size(1) < n:
            continue
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
    number = lambda value: f"{value:.4f}" if isinstance(value, float) else f"{value}"
    lines = ["final metrics"] + [f"  {key:<28} {number(value)}" for key, value in report.items()
                                 if not isinstance(value, (list, dict))]
    if levels := report.get("levels"):
        lines.append("  by noise level" + "".join(f"{entry['level']:>8.2f}" for entry in levels))
        lines += [f"  {name:>14}" + "".join(f"{entry[name]:>8.3f}" for entry in levels) for name in ("loss", "entropy", "accuracy")]
    if "samples" in report:
        lines.append(f"  {'':<28} {'samples':>10} {'held-out text':>14}")
        lines += [f"  {key:<28} {number(value):>10} {number(report['reference'].get(key, '')):>14}"
                  for key, value in report["samples"].items()]
    return "\n".join(lines)
