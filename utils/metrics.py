"""The final metrics block: numbers about a trained model, each with its unit, and how they are
shown."""

import dataclasses
import math
import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F

import diffusion
from utils import encoding, families, judges, pairs, samples
from utils.built_in import BUILT_IN
from utils.cli import UserError

SEARCHED = 5_000_000  # training tokens that copies are looked for in


def final(model, family, data, hardware, steps, count, how, judge=None):
    """The final metrics block but for `held_out` (dict): `levels_of`, and of `count` samples what
    `samples.judge_rows` says; of a corpus with puzzles, how many of as many are solved, at
    temperature 0.

    steps     of the run, which say what it was trained on where that has no end
    how       SampleConfig of the samples
    judge     of `utils.judges`, which scores the samples too
    """
    cfg = family.cfg
    with hardware.autocast():
        report = levels_of(model, family, data, hardware.device)
        if not count:
            return report
        rest = (model, family, data.tokenizer)
        blanks = samples.canvases(family, data.tokenizer, count, data.held_out)
        rows, figures = samples.generate_rows(*rest, blanks, hardware.device, how)
        puzzles = BUILT_IN[cfg.data].puzzles(count) if cfg.data in BUILT_IN else []
        # a model of blocks fills no holes, and a window has to hold a puzzle
        fills = cfg.rows == "pair" or cfg.rows == "document" and not family.block_len
        if puzzles and fills:
            sure = dataclasses.replace(how, temperature=0.0, final_temperature=None)
            report |= samples.solve_puzzles(*rest, puzzles, hardware.device, sure)
    # what it was trained on need not be at hand
    searched = data.training(steps, SEARCHED) if data.training else None
    rest = dict(tokenizer=data.tokenizer, cfg=cfg, training=searched, judge=judge)
    return report | {
        "samples": samples.judge_rows(rows, **rest) | figures,
        "reference": samples.judge_rows(
            samples.reference_rows(data.held_out, data.tokenizer, count), **rest
        ),
        "copies_looked_for_in_tokens": 0 if searched is None else searched.numel(),
    }


def bound(model, family, tokenizer, rows, passes=1):
    """Estimates of the NELBO of rows (R, L) long, (R, passes): their mean is in nats per token; of
    pairs per token of the answers, their ends included."""
    on_cpu = rows.cpu()  # where masks are drawn
    given = encoding.given_of(on_cpu, tokenizer, family.cfg)
    nll = family.nelbo(model, rows, passes, given)
    if given is None:
        return nll
    tokens = encoding.count_tokens(on_cpu, tokenizer, family.cfg).sum().item()
    return nll * (rows.numel() / tokens)


def held_out(model, family, data, device):
    """Held-out bound of `model` on the first cfg.final_rows held-out rows, in every unit (dict of
    floats).

    `<|endoftext|>` counts in nats and not in characters: a model also has to say where a text ends.
    Words are counted as `encoding.words` says, so that its perplexity stands beside published ones.
    On a built-in corpus the exact -log_prob of the same texts stands beside the bound. Of an
    autoregressive model the "bound" is exact.
    """
    cfg = family.cfg
    rows = data.held_out[: cfg.final_rows].to(device)
    nll = bound(model, family, data.tokenizer, rows, cfg.final_masks)
    mean, se_rows, se_masks = mean_and_errors(nll)
    tokens = encoding.count_tokens(rows.cpu(), data.tokenizer, cfg)
    nats, exact, a_row = mean * tokens.sum().item(), family.exact, tokens.float().mean().item()
    each = nll.mean(1).cpu() * a_row  # nats of each row
    if cfg.rows == "pair":  # a ratio, of answers of several lengths
        se_rows = judges.ratio_error(each, tokens)
    said = encoding.without_given(rows, data.tokenizer, cfg)
    lengths = encoding.row_lengths(said, data.tokenizer)
    words = encoding.words(said, data.tokenizer, cfg)
    report = {
        "bound_nats_per_token": mean,
        "bound_se_rows": se_rows,
        "bound_se_masks": 0.0 if exact else se_masks,
        "bound_bits_per_character": nats / math.log(2) / lengths[:, 0].sum().item(),
        "bound_bits_per_byte": nats / math.log(2) / lengths[:, 1].sum().item(),
        "bound_bits_per_byte_se_rows": judges.ratio_error(each / math.log(2), lengths[:, 1]),
        "perplexity_of_bound": perplexity(mean),
        "bound_nats_per_word": nats / words,
        "perplexity_of_bound_per_word": perplexity(nats / words),
        "held_out_rows": len(rows),
        "masks_a_row": 0 if exact else cfg.final_masks,
    }
    if cfg.ar_weight:  # in windows of a text all tokens but the first
        given = encoding.given_of(rows.cpu(), data.tokenizer, cfg)
        exact_nats = family.left_to_right(model, rows, given).sum().item() * rows.size(1)
        scored = tokens.sum().item() - (0 if family.bos else len(rows))
        report["left_to_right_nats_per_token"] = exact_nats / scored
    if cfg.data in BUILT_IN and cfg.rows != "stream":
        made = BUILT_IN[cfg.data]
        truth = -sum(map(made.log_prob, made.held_out(cfg.seed)[: len(rows)])) / len(rows)
        report |= {
            f"bound_nats_per_{made.noun}": mean * a_row,
            f"exact_nats_per_{made.noun}": truth,
            "excess_over_exact": mean * a_row / truth - 1 if truth else None,
            f"entropy_nats_per_{made.noun}": made.entropy(),
        }
    return report


class TextBound(NamedTuple):
    """The bound on -log p of a text and of its end, with standard errors."""

    nats: float
    se_masks: float  # what other masks would change; 0 where the bound is exact
    se_rows: float  # what another text of as many rows would; nan of a single one
    tokens: int
    nats_per_token: float
    bits_per_byte: float


def text_bound(model, family, tokenizer, text, passes, prompt=""):
    """`TextBound` of a text (str), in rows as the model was trained on.

    Of a model of documents: `<|endoftext|>`, which is given, the text, and `<|endoftext|>` to the
    end of the window (none if the text just fills it). Of one of windows: `<|endoftext|>`, which is
    given, the text and `<|endoftext|>`, cut into windows; what fills a last block up is given too.
    Of one of pairs: the answer to the prompt (str), and tokens are its own and its end's.
    """
    device = next(model.parameters()).device
    parts = rows_of_text(text, tokenizer, family, prompt)
    each = torch.cat(
        [
            family.nelbo(model, rows.to(device), passes, given).double().cpu() * rows.size(1)
            for rows, given in parts
        ]
    )  # (rows, passes), nats
    tokens = torch.cat([(~given).sum(1) for _, given in parts])
    if family.cfg.rows == "pair":
        tokens = pairs.answer_lengths(parts[0][0], tokenizer)
    nats, _, se_masks = (figure * len(each) for figure in mean_and_errors(each))
    total = int(tokens.sum())
    return TextBound(
        nats,
        0.0 if family.exact else se_masks,
        judges.ratio_error(each.mean(1), tokens) * total,
        total,
        nats / total,
        nats / math.log(2) / len(text.encode()),
    )


def rows_of_text(text, tokenizer, family, prompt=""):
    """[(rows (R, l) long, what of them is given (R, l) bool)] of a text: those of whole windows,
    and the last one, which may be shorter."""
    if not text:
        raise UserError("there is no text to judge")
    tokenizer.encode([text], "the text")  # complains of what it does not know
    L, n = family.cfg.seq_len, family.block_len or 1
    if family.cfg.rows == "pair":
        rows, left_out = pairs.rows_of([pairs.asked(prompt, text)], tokenizer, L)
        if left_out:
            raise UserError(f"prompt, text and end are longer than the window of {L} tokens")
        return [(rows, pairs.given(rows, tokenizer))]
    if prompt:
        raise UserError("prompt is for a model of pairs; put it in front of the text")
    if family.bos:
        rows = encoding.document_rows([text], tokenizer, L)
        return [(rows, (torch.arange(L) < family.bos).expand(rows.shape))]
    ids = encoding.token_stream([text], tokenizer).long()
    given = torch.arange(len(ids)) < int(tokenizer.end is not None)
    whole, missing = len(ids) // L * L, -(len(ids) % L) % n
    last = F.pad(ids[whole:], (0, missing), value=tokenizer.end or 0)
    last_given = F.pad(given[whole:], (0, missing), value=True)
    parts = [(ids[:whole].view(-1, L), given[:whole].view(-1, L)), (last[None], last_given[None])]
    return [(rows, given) for rows, given in parts if rows.numel()]


def mean_and_errors(nll):
    """Mean of nll (R, passes) and its two standard errors, over rows and over masks.

    rows   what another sample of as many held-out rows would change (their own masks included)
    masks  what other masks on the same rows would change; passes are independent, so their spread
           tells (nan for one)
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
    """What the network knows of masked tokens at each noise level, on the held-out rows of
    `held_out`: {"levels": list of dicts of loss (nats), entropy of its distribution (nats),
    accuracy of its likeliest token}, and their means.

    At what is corrupted as the family's `probes` say. For masks also what much public code calls
    "perplexity", the exponential of the mean cross entropy of all masked tokens under the training
    schedule: no likelihood, and another number with every schedule.
    """
    rows = data.held_out[: family.cfg.final_rows].to(device)
    levels, generator = {}, torch.Generator().manual_seed(0)
    # what does not depend on a mask ratio is looked at once
    given = encoding.given_of(rows.cpu(), data.tokenizer, family.cfg)
    all_ = None
    if family.exact:
        all_ = _look(model, family, rows, family.corrupt(rows.shape, given=given))
    for level, corruption in family.probes(model, rows.shape, LEVELS, generator, given):
        if family.exact:
            found = all_.masked_fill(~corruption.masked, math.nan)
        else:
            found = _look(model, family, rows, corruption)
        levels[level] = _means(level, found)  # few masks have few ratios
    report = {
        "levels": list(levels.values()),
        "accuracy": statistics.fmean(entry["accuracy"] for entry in levels.values()),
        "entropy": statistics.fmean(entry["entropy"] for entry in levels.values()),
    }
    if family.exact:
        report["nats_per_token_but_the_first"] = all_[0][:, 1:].nanmean().item()
    elif given is None and "pooled" in family.needs.get("loss_weighting", diffusion.WEIGHTINGS):
        mean = pooled_ce(model, family.cfg, rows, generator)
        report |= {
            "masked_ce_pooled": mean,
            "exp_of_masked_ce_schedule_dependent": perplexity(mean),
        }
    return report


def pooled_ce(model, cfg, rows, generator):
    """Mean cross entropy, in nats, of all tokens of rows (R, L) that are masked under the training
    schedule."""
    family = families.family_of(
        dataclasses.replace(
            cfg, loss_weighting="pooled", time_sampling="uniform", complementary=False
        )
    )
    losses = []
    for part in rows.split(cfg.rows_at_once):
        corruption = family.corrupt(part.shape, generator).to(rows.device)
        corruption = corruption._replace(conditioned=None)  # of all rows, as in the bound
        counts = corruption.masked.sum().item()
        losses.append((family.loss(model, part, corruption).mean().item() * counts, counts))
    return sum(loss for loss, _ in losses) / max(1, sum(count for _, count in losses))


def _look(model, family, rows, corruption):
    """(loss, entropy, 1.0 where the likeliest token is right), each (R, L) with nan where rows (R,
    L) are not corrupted, on the CPU."""
    out, size = torch.full((3, *rows.shape), math.nan), family.cfg.rows_at_once
    for number, (x0, piece) in enumerate(
        zip(rows.split(size), corruption.split(slice(0, len(rows)), size))
    ):
        index = piece.masked.flatten().nonzero()[:, 0]
        log_p = family.log_p(model, x0, piece.to(rows.device), index.to(rows.device))
        target = x0.flatten()[index.to(rows.device)]
        figures = torch.stack(
            (
                -log_p.gather(1, target[:, None])[:, 0],
                torch.special.entr(log_p.exp()).sum(-1),
                (log_p.argmax(-1) == target).float(),
            )
        )
        part = slice(number * size, number * size + len(x0))
        out[:, part] = (
            out[:, part].flatten(1).index_copy(1, index, figures.float().cpu()).view(3, *x0.shape)
        )
    return out


def _means(level, found):
    return {"level": level} | {
        name: part.nanmean().item() for name, part in zip(("loss", "entropy", "accuracy"), found)
    }


@torch.no_grad()
def left_to_right(model, family, rows):
    """-log p of rows (R, L) when the network generates them from left to right, one token at a
    time: (R,) nats per token. The exact likelihood of a sampler that does; of an autoregressive
    network, its likelihood. Not for uniform noise."""
    L, out = rows.size(1), []
    for row in rows:
        canvases = row.expand(L - family.bos, L).clone()
        places = torch.arange(family.bos, L, device=rows.device)
        canvases[torch.arange(L, device=rows.device) >= places[:, None]] = model.vocab_size - 1
        total = 0.0
        for part in torch.arange(L - family.bos, device=rows.device).split(family.cfg.rows_at_once):
            index = torch.arange(len(part), device=rows.device) * L + places[part]
            logits = family.logits(model, canvases[part], index)
            total += diffusion.token_nll(logits, row[places[part]]).sum().item()
        out.append(total / L)
    return torch.tensor(out)


def show(report):
    """The report (dict) as lines of text."""
    number = lambda value: f"{value:.4f}" if isinstance(value, float) else f"{value}"
    lines = ["final metrics"] + [
        f"  {key:<28} {number(value)}"
        for key, value in report.items()
        if not isinstance(value, (list, dict))
    ]
    if levels := report.get("levels"):
        lines.append("  by noise level" + "".join(f"{entry['level']:>8.2f}" for entry in levels))
        lines += [
            f"  {name:>14}" + "".join(f"{entry[name]:>8.3f}" for entry in levels)
            for name in ("loss", "entropy", "accuracy")
        ]
    if "samples" in report:
        lines.append(f"  {'':<28} {'samples':>10} {'held-out text':>14}")
        lines += [
            f"  {key:<28} {number(value):>10} {number(report['reference'].get(key, '')):>14}"
            for key, value in report["samples"].items()
        ]
    return "\n".join(lines)
