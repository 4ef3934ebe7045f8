"""Pictures of numbers. matplotlib is imported when one is drawn: it takes seconds, and a GPU
machine may lack it."""

import json
import os

from utils import cli

# told apart by all eyes
OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#1d1d1f")


def pyplot():
    """matplotlib.pyplot, drawing into files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def loss_curves(logs, path):
    """Training loss and held-out bound over the steps of the runs whose JSONL `logs` are given, as
    a PNG at `path`."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, log in enumerate(logs):
        entries = [json.loads(line) for line in open(log, encoding="utf-8")]
        steps = [entry["step"] for entry in entries]
        bound, error = ([entry[key] for entry in entries] for key in ("bound", "bound_se_rows"))
        name = os.path.splitext(os.path.basename(log))[0]
        axis.plot(
            steps,
            [entry["loss"] for entry in entries],
            "--",
            color=f"C{number}",
            label=f"{name}: training loss",
        )
        axis.plot(
            steps,
            bound,
            "o-",
            ms=3,
            color=f"C{number}",
            label=f"{name}: held-out bound ± s.e. over rows",
        )
        axis.fill_between(
            steps,
            [b - e for b, e in zip(bound, error)],
            [b + e for b, e in zip(bound, error)],
            color=f"C{number}",
            alpha=0.2,
            lw=0,
        )
    axis.set(xlabel="step", ylabel="nats per token")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)
    plt.close(figure)


def levels(entries, name, path):
    """Loss, entropy and accuracy over the noise level (`metrics.levels_of`), as a PNG at `path`."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    level, right = [entry["level"] for entry in entries], axis.twinx()
    for key, style, colour in (("loss", "o-", OKABE_ITO[0]), ("entropy", "s--", OKABE_ITO[1])):
        axis.plot(
            level,
            [entry[key] for entry in entries],
            style,
            color=colour,
            ms=4,
            label=f"{key}, nats (left)",
        )
    right.plot(
        level,
        [100 * entry["accuracy"] for entry in entries],
        "^:",
        color=OKABE_ITO[2],
        ms=4,
        label="accuracy, % (right)",
    )
    axis.set(
        xlabel="noise level (ar: share of the row to come)",
        ylabel="nats per token",
        xlim=(0, 1.02),
        ylim=(0, None),
        title=name,
    )
    right.set(ylabel="likeliest token is right, %", ylim=(0, 100))
    axis.grid(alpha=0.3)
    handles, labels = (
        sum(pair, [])
        for pair in zip(axis.get_legend_handles_labels(), right.get_legend_handles_labels())
    )
    axis.legend(handles, labels, loc="lower center")
    save(figure, path)
    plt.close(figure)


def save(figure, path):
    """Write a matplotlib figure; an unwritable path is a UserError."""
    with cli.replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
