"""The three results that README shows, from the tables of artifacts/ablations: each picture for a
light page and for a dark one.

    python scripts/lab/front.py
"""

import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from scripts.lab.results import load
from utils import cli, plots
from utils.cli import field

ORANGE, GREEN, PINK, RED = plots.OKABE_ITO[1:5]
# paper, ink, and the blue that stands out from the paper
PAGES = {
    "light": ("#ffffff", "#1d1d1f", plots.OKABE_ITO[0]),
    "dark": ("#0d1117", "#e6edf3", plots.OKABE_ITO[5]),
}


@dataclass(frozen=True)
class FrontConfig:
    out_dir: str = field("artifacts/plots", "where to write", "what")


def label(axis, x, y, text, colour, **where):
    """The name of a line, beside it."""
    where = dict(xytext=(6, 0), textcoords="offset points", va="center") | where
    axis.annotate(text, (x, y), color=colour, fontsize=12, weight="bold", **where)


def quality(axis, blue):
    """Share of valid stories over NFE."""
    left, right = dict(xytext=(-8, 6), ha="right"), dict(xytext=(10, -4))
    for name, colour, point, where in (  # the point that the name stands beside
        ("entropy_bounded", ORANGE, -2, left),
        ("local_entropy", RED, -1, left),
        ("random", blue, 3, left),
        ("confidence", PINK, 3, right),
    ):
        rows = [
            (float(row["nfe"]), 100 * float(row["valid"]))
            for row in load("ablations/samplers.csv")
            if row["sampler"].partition(":")[0] == name
            and (row["top_p"], row["decode_block"], row["cache"]) == ("1.0", "0", "none")
        ]
        x, y = zip(*sorted(rows))
        axis.plot(x, y, "o-", color=colour, lw=2.5, ms=5)
        label(axis, x[point], y[point], name, colour, **where)
    axis.set(xscale="log", xlabel="network evaluations for 66 tokens (NFE)", ylim=(-3, 103))
    axis.set_ylabel("valid stories, %")
    axis.set_xticks([4, 8, 16, 32, 64], [4, 8, 16, 32, 64])
    axis.minorticks_off()
    axis.set_xlim(3.6, 90)


def speed(axis, blue):
    """Held-out NELBO over minutes of training: the course of one run, and the ends of runs of ours,
    each with its learning rate decayed, all by the estimate of the log."""
    rows = {row["variant"]: row for row in load("ablations/recipe_shakespeare.csv")}
    theirs = rows["the micro-dLLMs' recipe, 300 steps"]
    points = [entry.split(":") for entry in theirs["curve"].split()]
    x, y = [float(p[1]) for p in points], [float(p[2]) for p in points]
    axis.plot(x, y, "o-", color=blue, lw=2.5, ms=4)
    label(axis, x[-6], y[-6], "the micro-dLLMs' recipe", blue, xytext=(-12, -6), ha="right")
    ours = [
        row for name, row in rows.items() if name.startswith("our recipe") and "half" not in name
    ]
    ours = sorted((float(row["minutes"]), float(row["last_bound"])) for row in ours)
    axis.plot(*zip(*ours), "o-", color=ORANGE, lw=2.5, ms=5)
    label(axis, *ours[2], "our recipe", ORANGE, xytext=(12, 8))
    axis.axhline(y[-1], color=blue, lw=1, ls=":")
    label(axis, 5, y[-1], f"theirs after {theirs['steps']} steps", blue, xytext=(0, -9))
    axis.set(xscale="log", xlabel="minutes of training steps, two CPU cores")
    axis.set_ylabel("held-out NELBO, nats a character")
    axis.set_xticks([0.5, 1, 2, 5, 10, 20], ["½", 1, 2, 5, 10, 20])
    axis.minorticks_off()


def families(axis, blue):
    """How far each family is behind the autoregressive one of the same size."""
    kinds = ("blocks of 1", "blocks of 4", "blocks of 16", "blocks of 64", "masked")
    for file, colour, text in (
        ("families", blue, "Tiny Shakespeare"),
        ("families_on_stories_847", GREEN, "TinyStories"),
        ("families_tales", ORANGE, "tales"),
    ):
        rows = {row["variant"]: row for row in load(f"ablations/{file}.csv")}
        least = float(rows["autoregressive"]["bound"])
        y = [100 * (float(rows[kind]["bound"]) / least - 1) for kind in kinds]
        error = [100 * float(rows[kind]["se_rows"]) / least for kind in kinds]
        axis.errorbar(range(len(kinds)), y, error, fmt="o-", color=colour, lw=2.5, ms=5, capsize=4)
        label(axis, len(kinds) - 1, y[-1], text, colour, xytext=(6, -8 if text == "tales" else 2))
    axis.axhline(0, color="gray", lw=1)
    label(axis, 4, 0, "autoregressive", "gray", xytext=(6, 9))
    axis.set_xticks(range(len(kinds)), ["blocks of 1", "4", "16", "64", "masked,\nany order"])
    axis.set_ylabel("NELBO above the autoregressive\nmodel's -log p, %")
    axis.set_xlim(-0.3, 5.4)


FRONT = {function.__name__: function for function in (quality, speed, families)}


def run(positional, overrides):
    options, plt = cli.merge(FrontConfig, overrides), plots.pyplot()
    for name, draw in FRONT.items():
        for page, (paper, ink, blue) in PAGES.items():
            colours = dict.fromkeys(
                "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color".split(), ink
            )
            with plt.rc_context(colours | {"figure.facecolor": paper, "axes.facecolor": paper}):
                figure, axis = plt.subplots(figsize=(8, 3.8), layout="constrained")
                draw(axis, blue)
                axis.grid(alpha=0.2)
                axis.spines[["top", "right"]].set_visible(False)
                axis.xaxis.label.set_size(12), axis.yaxis.label.set_size(12)
                axis.tick_params(labelsize=11)
                path = os.path.join(options.out_dir, f"front_{name}_{page}.png")
                plots.save(figure, path)
                plt.close(figure)
                print(f"wrote {path}")


main = cli.command(FrontConfig, run, __doc__, unexpected="It draws all pictures")
if __name__ == "__main__":
    cli.run(main)
