"""Tables of puzzles, of questions and answers, of what came from an autoregressive network, and of
the recipe of uniform noise; see tables.py."""

import re
from operator import itemgetter

from scripts.lab.results import best_at_most, load, mean, share, source, table


def puzzles(file):
    """Share of puzzles that each sampler solves, always by the likeliest digit, at its best setting
    of at most so much NFE."""
    groups, limits = {}, (2, 4, 8, 16, 24, 64)
    for row in load(file):
        if row["temperature"] == "0.0":
            groups.setdefault(row["sampler"].partition(":")[0], []).append(row)
    rows = [
        [f"`{name}`", *(best_at_most(rows, limit, "solved") for limit in limits)]
        for name, rows in groups.items()
    ]
    return table(["sampler", *(f"{limit} NFE" for limit in limits)], rows) + source(file)


def difficulty():
    """Share of puzzles that are solved by their number of clues, in random order and by
    entropy."""
    file, kinds = "ablations/puzzle_difficulty.csv", {}
    for row in load(file):
        name = f"{row['clues']} clues" + ", a solver guesses" * (row["guesses"] != "0")
        kinds.setdefault(name, {})[row["sampler"]] = f"{float(row['solved']):.1%}"
    rows = [[name, *shares.values()] for name, shares in kinds.items()]
    return table(["puzzles", *map("`{}`".format, next(iter(kinds.values())))], rows) + source(file)


def puzzle_families():
    """What families of one shape solve after equal minutes, each by its samplers: means over seeds,
    and the least and the largest share."""
    file, groups = "ablations/puzzle_families_sudoku.csv", {}
    for row in load(file):
        groups.setdefault((row["variant"], row["sampler"]), []).append(row)
    cells, before = [], None
    for (name, sampler), rows in groups.items():
        shares = [float(row["solved"]) for row in rows if row["solved"]]
        spread = (
            f"{sum(shares) / len(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"
            if shares
            else ""
        )
        bound = (
            f"{mean(rows, 'bound') / mean(rows, 'exact') - 1:.1%}"
            if mean(rows, "exact")
            else f"{mean(rows, 'bound'):.3f} nats"
        )
        steps = f"{mean(rows, 'steps'):,.0f}"
        first = [name, steps, bound] if name != before else ["", "", ""]
        nfe = f"{mean(rows, 'nfe'):.1f}" if shares else ""
        cells.append([*first, f"`{sampler}`", nfe, spread])
        before = name
    head = ["family", "steps", "NELBO above exact", "sampler", "NFE", "solved"]
    return table(head, cells) + source(file)


def canvas(file):
    """What each variant of the recipe comes to after equal minutes: its bound; the best of its
    samplers at most so much NFE, with the log-probability of its valid stories; and what it
    repairs: means over seeds."""
    limits, wrong, variants = (16, 20, 32, 66), (1, 2, 4, 8), {}
    for row in load(file):
        variants.setdefault(row["variant"], {}).setdefault(
            (row["sampler"], row["steps"]), []
        ).append(row)
    cells = []
    for name, ways in variants.items():
        rows = [row for group in ways.values() for row in group]
        line = [name, f"{mean(rows, 'training_steps'):,.0f}", f"{mean(rows, 'above_exact'):.1%}"]
        wrote = [rows for (way, _), rows in ways.items() if not way.startswith("repair")]
        for limit in limits:
            few = [rows for rows in wrote if mean(rows, "nfe") <= limit]
            best = max(few, key=lambda rows: mean(rows, "valid"), default=None)
            known = [row for row in best or () if row["log_prob"]]
            likely = f" ({mean(known, 'log_prob'):.2f})" if known else ""
            line.append(f"{mean(best, 'valid'):.1%}{likely}" if best else "–")
        for count in wrong:
            again = f"repair {count}"
            found = [r for (way, _), r in ways.items() if re.fullmatch(f"{again}(, .*)?", way)]
            shares = [mean(rows, "repaired") for rows in found]
            line.append(f"{max(shares):.1%}" if shares else "–")
        cells.append(line)
    head = ["variant", "steps", "NELBO above exact", *(f"valid, {n} NFE" for n in limits)]
    head += [f"{n} repaired" for n in wrong]
    return table(head, cells) + source(file)


GUIDANCE = {  # what guidance does to stories on request
    "guidance": itemgetter("guidance"),
    "top-p": itemgetter("top_p"),
    "NFE": lambda row: f"{float(row['nfe']):.1f}",
    "valid": share("valid"),
    "and as asked": share("obeying"),
    "different": share("distinct"),
    "log-probability of those": itemgetter("log_prob"),
}
PADDING = {  # what stands behind an answer in training
    "behind the end": itemgetter("behind the end"),
    "steps": lambda row: f"{int(row['steps']):,}",
    "NELBO, nats a token": lambda row: f"{float(row['bound']):.3f}",
    "sampler": lambda row: f"`{row['sampler']}`",
    "ended": share("ended"),
    "beginnings of a story": share("valid"),
    "total variation of their lengths": lambda row: f"{float(row['total_variation']):.3f}",
    "NFE": lambda row: f"{float(row['nfe']):.1f}",
}


def adapt(file):
    """Bounds after as many steps in all, the first of them autoregressive."""
    kinds, shares = {}, {}
    for row in load(file):
        kinds.setdefault(row["then"], {}).setdefault(row["autoregressive"], []).append(row)
        shares[row["autoregressive"]] = f"{float(row['autoregressive']):.0%} of the steps before"
    cells = [
        [name, *(f"{mean(found[s], 'bound'):.3f}" if s in found else "" for s in shares)]
        for name, found in kinds.items()
    ]
    return table(["then masked", *shares.values()], cells) + source(file)
