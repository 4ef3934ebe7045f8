"""Figures of the comparisons."""

import itertools
import math

from config import SampleConfig
from utils import plots


def curve(row):
    """Points (steps, minutes, held-out bound, and where it was recorded the training loss) of a row
    of scripts/lab/ablate.py's training runs (dict of str)."""
    return [tuple(map(float, point.split(":"))) for point in row["curve"].split()]


def bound_over_cost(rows, title, path, *, bits=False):
    """Held-out bound of training runs over the rows seen and over the minutes taken, and where each
    variant ends.

    rows are those of scripts/lab/ablate.py's training comparisons (dicts of str); every seed is a
    curve. bits: a byte, which compare where tokens differ; else nats a token. A PNG at `path`.
    """
    plt = plots.pyplot()
    from matplotlib import ticker

    unit = lambda row: float(row["bits_per_byte"]) / float(row["bound"]) if bits else 1.0
    variants = {}
    for row in rows:
        if row["curve"]:  # not of a run that diverged
            variants.setdefault(row["variant"], []).append(row)
    ends = {
        name: sum(unit(row) * float(row["bound"]) for row in runs) / len(runs)
        for name, runs in variants.items()
    }
    order = sorted(ends, key=ends.get)
    figure, axes = plt.subplots(
        1, 3, figsize=(15, 4 + 0.15 * len(order)), width_ratios=(3, 3, 2), layout="constrained"
    )
    for place, name in enumerate(order):
        style = dict(
            color=plots.OKABE_ITO[place % 7], ls=("-", "--", ":", "-.")[place // 7 % 4], lw=1.2
        )
        for row in variants[name]:
            points = curve(row)
            bounds = [unit(row) * point[2] for point in points]
            axes[0].plot([p[0] * float(row["rows_a_step"]) for p in points], bounds, **style)
            axes[1].plot([p[1] for p in points], bounds, **style)
            axes[2].errorbar(
                unit(row) * float(row["bound"]),
                -place,
                xerr=unit(row) * float(row["se_rows"]),
                fmt="o",
                ms=4,
                color=style["color"],
            )
    axes[2].set_yticks([-place for place in range(len(order))], order)
    drawn = [row for runs in variants.values() for row in runs]
    low = min((unit(row) * point[2] for row in drawn for point in curve(row)), default=0)
    for axis, cost in zip(axes, ("rows seen", "minutes")):
        axis.set(
            xlabel=cost,
            ylabel=f"held-out bound, {'bits per byte' if bits else 'nats per token'}",
            ylim=(low - 0.05, low + 1.2),
            xscale="log",
        )
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes[2].set(xlabel="bound at the end (± s.e. over rows,\nthe same rows for all)")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    plots.save(figure, path)
    plt.close(figure)


def overfitting(rows, title, path):
    """Held-out bound and training loss of scripts/lab/ablate.py's training runs (dicts of str) over
    the rows seen; the lowest bound of each is marked. A PNG at `path`."""
    plt = plots.pyplot()
    figure, axes = plt.subplots(
        1, 2, figsize=(13, 5), layout="constrained", sharex=True, sharey=True
    )
    for number, row in enumerate(row for row in rows if row["curve"]):
        points = curve(row)
        seen = [p[0] * float(row["rows_a_step"]) for p in points]
        style = dict(color=plots.OKABE_ITO[number % 7], ls=("-", "--")[number // 7 % 2], lw=1.5)
        axes[0].plot(seen, [p[2] for p in points], **style)
        best = min(range(len(points)), key=lambda i: points[i][2])
        axes[0].plot(seen[best], points[best][2], "o", color=style["color"], ms=6)
        axes[1].plot(seen, [p[3] for p in points], label=row["variant"], **style)
    for axis, what in zip(axes, ("held-out bound (dots: the lowest)", "training loss")):
        axis.set(xlabel="rows seen", ylabel="nats per token", xscale="log", title=what)
        axis.grid(alpha=0.3)
    figure.legend(
        *axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9
    )
    figure.suptitle(title)
    plots.save(figure, path)
    plt.close(figure)


ENOUGH = 10  # % valid, for a mean over the valid ones to be more than noise


def curves_of(rows):
    """{name of a curve: its rows, by cost}, of rows of the comparison "samplers"."""
    curves = {}
    for row in rows:
        name = row["sampler"].partition(":")[0] + "".join(
            words.format(row[key])
            for key, words, plain in (
                ("decode_block", ", blocks of {}", "0"),
                ("cache", ", {} cache", "none"),
                ("top_p", ", top-p", "1.0"),
            )
            if row[key] != plain
        )
        curves.setdefault(name, []).append(row)
    return {name: sorted(points, key=cost) for name, points in curves.items()}


cost = lambda row: float(row["nfe"])
quality = lambda row: 100 * float(row["valid"])
surplus = lambda row: (
    float(row["log_prob"]) + float(row["entropy"]) if row["log_prob"] else math.nan
)


def quality_against_cost(rows, title, path):
    """Share of valid samples, and distance of their log-probability from -entropy, over NFE.

    rows are those of scripts/lab/ablate.py samplers (dicts of str); a PNG at `path`.
    """
    plt = plots.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    sure = [row for row in rows if quality(row) >= ENOUGH]
    beaten = lambda row: any(cost(r) <= cost(row) and quality(r) > quality(row) for r in rows)
    best = [row for row in sure if not beaten(row)]
    styles = [(colour, marker) for marker in "osD^" for colour in plots.OKABE_ITO]
    for (name, points), (colour, marker) in zip(curves_of(rows).items(), styles):
        leads = [row for row in points if row in best]
        style = dict(ms=6, lw=2.2) if leads else dict(ms=4, lw=1, alpha=0.45)
        style |= dict(marker=marker, color=colour)
        for axis, y, shown in (
            (axes[0], quality, points),
            (axes[1], surplus, [row for row in points if row in sure]),
        ):
            axis.plot([cost(row) for row in shown], [y(row) for row in shown], label=name, **style)
        # longer ones would not fit; the legend has them
        for row in leads[-1:] if len(name) < 25 else ():
            at = dict(xytext=(-6, 2), textcoords="offset points", ha="right")
            axes[0].annotate(name, (cost(row), quality(row)), **at, color=colour, weight="bold")
    nfe = "network evaluations (NFE) a sample"
    axes[0].set(xlabel=nfe, ylabel="% of samples that are valid stories", ylim=(-2, 104))
    axes[1].set(xlabel=nfe, ylabel="log-probability of valid samples + entropy, nats")
    axes[1].axhline(0, color="#1d1d1f", lw=1)
    axes[0].set_title("bold: nothing is better at the same cost", fontsize=10)
    axes[1].set_title(
        f"above 0: too likely (collapsed); settings with {ENOUGH}% valid or more", fontsize=10
    )
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xlim(0.8 * min(map(cost, rows)), 1.25 * max(map(cost, rows)))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.grid(alpha=0.3)
    below = dict(loc="outside lower center", ncols=6, fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), **below)
    figure.suptitle(title)
    plots.save(figure, path)
    plt.close(figure)


def solved(rows, title, path):
    """Share of puzzles that are solved over NFE, by sampler: always the likeliest digit, and drawn;
    rows are those of scripts/lab/ablate.py puzzles (dicts of str). A PNG at `path`."""
    plt = plots.pyplot()
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    figure, axes = plt.subplots(
        1, len(temperatures), figsize=(13, 5), sharey=True, squeeze=False, layout="constrained"
    )
    kind = lambda row: row["sampler"].partition(":")[0]
    styles = [(colour, marker) for marker in "osD^" for colour in plots.OKABE_ITO]
    for axis, t in zip(axes[0], temperatures):
        drawn = [row for row in rows if row["temperature"] == t]
        for name, (colour, marker) in zip(dict.fromkeys(map(kind, drawn)), styles):
            own = sorted((row for row in drawn if kind(row) == name), key=cost)
            share = [100 * float(row["solved"]) for row in own]
            error = [100 * float(row["se"]) for row in own]
            style = dict(marker=marker, color=colour, label=name, capsize=2)
            axis.errorbar(list(map(cost, own)), share, yerr=error, **style)
        axis.set(xlabel="network evaluations (NFE) a puzzle", ylim=(-2, 104))
        axis.set_title(f"temperature {float(t):g}", fontsize=10)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("% of puzzles solved (± standard error)")
    below = dict(loc="outside lower center", ncols=6, fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), **below)
    figure.suptitle(title)
    plots.save(figure, path)
    plt.close(figure)


def by_difficulty(rows, title, path):
    """Share of puzzles that are solved over the number of their clues, by sampler, and apart where
    a solver guesses; rows are those of scripts/lab/ablate.py puzzle_difficulty (dicts of str). A
    PNG at `path`."""
    plt = plots.pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, colour in zip(dict.fromkeys(row["sampler"] for row in rows), plots.OKABE_ITO):
        for guesses, style in (("0", "o-"), ("1", "s--")):
            own = [row for row in rows if (row["sampler"], row["guesses"]) == (name, guesses)]
            share, error = ([100 * float(row[part]) for row in own] for part in ("solved", "se"))
            label = name + ", a solver guesses" * (guesses != "0")
            clues = [int(row["clues"]) for row in own]
            axis.errorbar(clues, share, error, fmt=style, color=colour, label=label, capsize=2)
    axis.set(xlabel="clues", ylabel="% of puzzles solved (± standard error)", title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    plots.save(figure, path)
    plt.close(figure)


def by_family(rows, title, path):
    """Share of puzzles that are solved, by family and sampler: every seed a point, their mean a
    bar; rows are those of scripts/lab/ablate.py puzzle_families (dicts of str). A PNG at `path`."""
    plt = plots.pyplot()
    shares = {}
    for row in rows:
        if row["solved"]:
            name = f"{row['variant']}: {row['sampler']}"
            shares.setdefault(name, []).append(100 * float(row["solved"]))
    kinds = list(dict.fromkeys(name.partition(":")[0] for name in shares))
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.3 * len(shares)), layout="constrained")
    for place, (name, own) in enumerate(shares.items()):
        colour = plots.OKABE_ITO[kinds.index(name.partition(":")[0]) % 7]
        axis.barh(-place, sum(own) / len(own), color=colour, alpha=0.5)
        axis.plot(own, [-place] * len(own), "o", color=colour, ms=4)
    axis.set_yticks([-place for place in range(len(shares))], list(shares), fontsize=9)
    axis.set(xlabel="% of puzzles solved", xlim=(0, 102), title=title)
    axis.grid(axis="x", alpha=0.3)
    plots.save(figure, path)
    plt.close(figure)


def of_canvas(rows, title, path):
    """The bound of each variant; the best share of valid texts (or of known words) at up to so many
    NFE; and what of texts with wrong words is repaired, or the puzzles that are solved, by the best
    sampler: means over seeds. Rows are those of scripts/lab/ablate.py canvas (dicts of str). A PNG
    at `path`."""
    plt = plots.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(19, 6.5), layout="constrained")
    mean = lambda own, name: sum(float(row[name]) for row in own) / len(own)
    names, exact = list(dict.fromkeys(row["variant"] for row in rows)), "above_exact" in rows[0]
    share, what = ("valid", "valid texts") if exact else ("words", "known words")
    for number, name in enumerate(names):
        own = [row for row in rows if row["variant"] == name]
        colour = plots.OKABE_ITO[number % 7]
        style = dict(color=colour, ls=("-", "--", ":")[number // 7 % 3], label=name)
        bounds = {
            row["seed"]: 100 * float(row["above_exact"]) if exact else float(row["bound"])
            for row in own
        }
        axes[0].plot(list(bounds.values()), [number] * len(bounds), "o", color=colour)
        groups = {}
        for row in own:
            groups.setdefault((row["sampler"], row["steps"]), []).append(row)
        wrote, mended, puzzles = [], {}, 0.0
        for (sampler, _), group in groups.items():
            if sampler.startswith("repair"):
                words = int(sampler.split()[1].strip(","))
                mended[words] = max(mended.get(words, 0.0), 100 * mean(group, "repaired"))
            elif sampler.startswith("puzzles"):
                puzzles = max(puzzles, 100 * mean(group, "solved"))
            else:
                wrote.append((mean(group, "nfe"), 100 * mean(group, share)))
        if wrote:
            nfe, shares = zip(*sorted(wrote))
            best = list(itertools.accumulate(shares, max))
            axes[1].plot(nfe, best, drawstyle="steps-post", **style)
        if mended:
            axes[2].plot(list(mended), list(mended.values()), marker="o", **style)
        if puzzles:
            axes[2].barh(number, puzzles, color=colour)
    axes[0].set(xlabel="NELBO, % above exact" if exact else "NELBO (nats a token)")
    axes[0].set(xscale="log" if exact else "linear", yticks=range(len(names)))
    axes[0].set_yticklabels(names)
    for formatted in (axes[0].xaxis.set_major_formatter, axes[0].xaxis.set_minor_formatter):
        formatted("{x:g}")
    axes[0].invert_yaxis()
    axes[1].set(xlabel="NFE", ylabel=f"% {what}, best at most so many NFE", xlim=(0, None))
    axes[1].legend(fontsize=8)
    if any(row["sampler"].startswith("puzzles") for row in rows):
        axes[2].sharey(axes[0])
        axes[2].set(xlabel="% of puzzles solved")
    elif any(row["sampler"].startswith("repair") for row in rows):
        axes[2].set(xlabel="wrong words", ylabel="% repaired", xticks=(1, 2, 4, 8))
    else:
        axes[2].remove()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    plots.save(figure, path)
    plt.close(figure)


def over_guidance(rows, title, path):
    """Shares of valid and of obeying answers over the guidance; rows are those of
    scripts/lab/ablate.py guidance (dicts of str). A PNG at `path`."""
    plt = plots.pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for style, p in zip(("-", "--"), dict.fromkeys(row["top_p"] for row in rows)):
        own = [row for row in rows if row["top_p"] == p]
        for name, colour in zip(("valid", "obeying"), plots.OKABE_ITO):
            shares = [100 * float(row[name]) for row in own]
            label = f"{name}, top-p {float(p):g}"
            guidance = [float(row["guidance"]) for row in own]
            axis.plot(guidance, shares, style, marker="o", color=colour, label=label)
    axis.set(xlabel="guidance", ylabel="% of answers", title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    plots.save(figure, path)
    plt.close(figure)


def of_adapted(rows, title, path):
    """Bound over the share of the steps that were autoregressive, by how the masked network reads;
    every seed a point, their mean a line; rows are those of scripts/lab/ablate.py adapt (dicts of
    str). A PNG at `path`."""
    plt = plots.pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for place, name in enumerate(dict.fromkeys(row["then"] for row in rows)):
        points = {}
        for row in rows:
            if row["then"] == name:
                points.setdefault(float(row["autoregressive"]), []).append(float(row["bound"]))
        means = [(share, sum(own) / len(own)) for share, own in sorted(points.items())]
        style = dict(color=plots.OKABE_ITO[place])
        axis.plot(*zip(*means), marker="o", label=name, **style)
        for share, own in points.items():
            axis.plot([share] * len(own), own, ".", **style)
    axis.set(xlabel="share of the steps that were autoregressive", ylabel="NELBO (nats a token)")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend(title="then masked")
    plots.save(figure, path)
    plt.close(figure)


def of_padding(rows, title, path):
    """Shares of answers that end, and that are valid, by what stood behind the ends in training and
    by sampler; rows are those of scripts/lab/ablate.py padding (dicts of str). A PNG at `path`."""
    named = [row | {"sampler": f"{row['behind the end']}: {row['sampler']}"} for row in rows]
    what, names = "share of the answers", ("ended", "valid")
    bars([row | {"steps": ""} for row in named], title, path, names=names, what=what, legend="")


USUAL = {name: getattr(SampleConfig, name) for name in ("temperature", "top_p")}


def stories(rows, title, path, usual=USUAL):
    """Generative NLL and unigram entropy over NFE at the usual temperature and top-p, each beside
    that of held-out text; rows are those of scripts/lab/ablate.py stories (dicts of str). A PNG at
    `path`."""
    plt = plots.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    is_usual = lambda row: all(row[name] and float(row[name]) == usual[name] for name in usual)
    drawn = list(filter(is_usual, rows))
    kind = lambda row: (
        row["sampler"].partition(":")[0]
        + (f", blocks of {row['decode_block']}" if row["decode_block"] != "0" else "")
    )
    styles = [(colour, marker) for marker in "osD^" for colour in plots.OKABE_ITO]
    for name, (colour, marker) in zip(dict.fromkeys(map(kind, drawn)), styles):
        own = sorted((row for row in drawn if kind(row) == name), key=cost)
        for axis, what in zip(axes, ("judge_nats_per_character", "unigram_entropy")):
            values = [float(row[what]) for row in own]
            axis.plot(list(map(cost, own)), values, marker, label=name, color=colour)
    for axis, what, words in zip(
        axes,
        ("judge_nats_per_character", "unigram_entropy"),
        ("judge's NLL, nats a character", "unigram entropy of the samples, nats"),
    ):
        for row in rows:
            if row["sampler"] == "held-out text":
                axis.axhline(float(row[what]), color="#1d1d1f", lw=1, label="held-out text")
        axis.set(xscale="log", xlabel="network evaluations (NFE) a sample", ylabel=words)
        powers = (16, 32, 64, 128, 256)
        axis.set_xticks(powers, map(str, powers))
        axis.set_xticks([], minor=True)
        if drawn:
            axis.set_xlim(min(map(cost, drawn)) / 1.1, max(map(cost, drawn)) * 1.1)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(title)
    plots.save(figure, path)
    plt.close(figure)


def along_the_text(rows, title, path):
    """What becomes of long texts, part by part; rows are those of scripts/lab/ablate.py
    long_stories (dicts of str). A PNG at `path`."""
    plt = plots.pyplot()
    words = {
        "judge": "judge's NLL, nats of its token",
        "repeated": "words that end four repeated ones",
        "first_name": "texts that name the first name",
        "new_names": "new names",
    }
    figure, axes = plt.subplots(1, len(words), figsize=(15, 4), layout="constrained")
    parts = [name for name in rows[0] if name.startswith("judge_")]
    for row, colour in zip(rows, plots.OKABE_ITO):
        label = ", ".join(
            part
            for part, plain in (
                (row["sampler"], ""),
                (f"blocks of {row['decode_block']}", "blocks of 0"),
                (f"temperature {row['temperature']}", "temperature 1.0"),
            )
            if part != plain and not part.endswith(" ")
        )
        for axis, (what, name) in zip(axes, words.items()):
            values = [float(row[f"{what}_{number + 1}"]) for number in range(len(parts))]
            axis.plot(range(1, len(parts) + 1), values, "o-", color=colour, label=label)
            axis.set(xlabel="part of the text", ylabel=name, xticks=range(1, len(parts) + 1))
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(title)
    plots.save(figure, path)
    plt.close(figure)


def over_temperature(rows, title, path):
    """Share of valid samples, of different ones, and what valid ones are worth, over the
    temperature; rows are those of scripts/lab/ablate.py temperature (dicts of str). A PNG at
    `path`."""
    plt = plots.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    values = quality, (lambda row: 100 * float(row["distinct"])), surplus
    for number, name in enumerate(dict.fromkeys(row["sampler"] for row in rows)):
        own = [row for row in rows if row["sampler"] == name]
        for axis, value in zip(axes, values):
            axis.plot(
                [float(row["temperature"]) for row in own],
                [value(row) for row in own],
                "o-",
                ms=4,
                label=name,
                color=plots.OKABE_ITO[number],
            )
    for axis, what in zip(
        axes,
        ("% valid stories", "% different samples", "log-probability of valid ones + entropy, nats"),
    ):
        axis.set(xlabel="temperature", ylabel=what)
        axis.grid(alpha=0.3)
    axes[2].axhline(0, color=plots.OKABE_ITO[-1], lw=1)
    axes[0].legend()
    figure.suptitle(title)
    plots.save(figure, path)
    plt.close(figure)


def bars(rows, title, path, *, names, what, legend):
    """The figures called `names` (list of str), in the unit `what`, of each row of
    scripts/lab/ablate.py's comparisons of samplers (dicts of str), beside each other. A PNG at
    `path`."""
    plt = plots.pyplot()
    figure, axis = plt.subplots(figsize=(4 + 0.5 * len(rows), 4.5), layout="constrained")
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        axis.bar(
            [place + width * (number - (len(names) - 1) / 2) for place in range(len(rows))],
            [float(row[name] or math.nan) for row in rows],
            0.9 * width,
            label=name,
            color=plots.OKABE_ITO[number],
        )
    axis.set_xticks(
        range(len(rows)),
        [
            ", ".join(
                filter(
                    None,
                    (
                        row["sampler"],
                        row["steps"] and f"{row['steps']} steps",
                        *(
                            f"{key} {row[key]}"
                            for key in ("temperature", "top_p")
                            if row.get(key, "1.0") != "1.0"
                        ),
                    ),
                )
            )
            for row in rows
        ],
        rotation=30,
        ha="right",
        fontsize=8,
    )
    axis.set(ylabel=what, title=title)
    figure.legend(title=legend, loc="outside right upper")
    plots.save(figure, path)
    plt.close(figure)
