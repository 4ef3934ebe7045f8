"""Comparisons: one table of differences, one figure, one command each. What is done already is not
done again.

    # trains each variant; likewise weighting, ...; at a preset's own size; on another text
    python scripts/lab/ablate.py optimizer
    python scripts/lab/ablate.py optimizer --base shakespeare --iters 300
    python scripts/lab/ablate.py optimizer --data data/stories.txt
    # with the newest tales run; with another
    python scripts/lab/ablate.py samplers
    python scripts/lab/ablate.py samplers --checkpoint artifacts/models/tales.best.pt

Writes artifacts/ablations/NAME.csv, .md and .png (NAME_BASE_on_DATA with those). To add a
comparison, add a function and an entry to COMPARISONS; a comparison of training runs is an entry of
variants.TRAINED. Those of samplers stand in compare_samplers.py.
"""

import csv
import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import Callable, NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))


from config import DEVICES, DTYPES
from scripts.lab import compare_samplers, compare_training, figures, variants
from utils import cli
from utils.cli import UserError, field
from utils.families import FAMILIES


@dataclass(frozen=True)
class AblateConfig:
    checkpoint: str = field(
        "", "of the comparisons that need a trained model (default: the newest run's best)", "what"
    )
    num_samples: int = field(200, "samples of each setting, seeds 0, 1, ...", low=2, high=10**5)
    base: str = field(
        "",
        "preset that the training runs start from (default: Tiny Shakespeare at 4 x 128, window "
        "64)",
    )
    data: str = field(
        "", "corpus of the training runs instead of the base's, with a BPE of its own"
    )
    iters: int = field(
        300, "steps of each training run; with other batch sizes as many rows", low=1
    )
    yardstick_iters: int = field(5000, "steps of the sources' recipe (recipe)", low=1)
    seeds: int = field(
        1, "training runs of each variant, with the seeds 1, 2, ...", low=1, high=1000
    )
    only: str = field("", "only settings whose name begins so")
    out_dir: str = field("artifacts/ablations", "where to write")
    device: str = field("auto", "auto: cuda, else mps, else cpu", choices=DEVICES)
    dtype: str = field("auto", "of matrix products", choices=DTYPES)
    compile: str = field("auto", "torch.compile, of training runs", choices=("auto", "on", "off"))

    def __post_init__(self):
        cli.check(self)


class Comparison(NamedTuple):
    # options -> list of dicts: the settings that are compared, in order, first their name
    settings: Callable
    # options -> (function from such a dict to a dict of figures, dict of what else they depend on)
    measure: Callable
    plot: Callable  # (rows of the table, title, path) -> None
    summary: Callable = lambda rows: rows  # rows of the table -> those of the Markdown table


COMPARISONS = {
    "samplers": Comparison(
        compare_samplers.sampler_settings,
        compare_samplers.judge_samplers,
        figures.quality_against_cost,
    ),
    "temperature": Comparison(
        compare_samplers.temperature_settings,
        compare_samplers.judge_samplers,
        figures.over_temperature,
    ),
    "order": Comparison(
        compare_samplers.order_settings,
        compare_samplers.measure_order,
        partial(
            figures.bars,
            names=("early", "all"),
            legend="tokens",
            what="share of the most frequent tokens\n(a quarter of the training text)",
        ),
    ),
    "spelling": Comparison(
        compare_samplers.spelling_settings,
        compare_samplers.measure_spelling,
        partial(
            figures.bars,
            names=("words", "speakers"),
            legend="that the training text has",
            what="share",
        ),
    ),
} | {
    name: Comparison(
        partial(compare_training.train_settings, name),
        partial(compare_training.train_variants, name),
        figures.overfitting if name == "ar_vs_diffusion" else figures.bound_over_cost,
        compare_training.over_seeds,
    )
    for name in variants.TRAINED
}


# --- the runner -----------------------------------------------------------------------------------


def label(setting):
    return ", ".join(
        f"{key} {value}"
        for number, (key, value) in enumerate(setting.items())
        if not number or key not in ("config", "dtype") and value not in ("", 0, "none", 1.0)
    )


def read_table(path):
    """Rows (list of dicts of str) of a table that an earlier run wrote, [] if there is none."""
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_tables(rows, summary, stem):
    """The rows as CSV and those of the summary as Markdown, each replaced as a whole. What is the
    same in all rows of the Markdown stands above it."""
    names = lambda rows: list(dict.fromkeys(name for row in rows for name in row))
    with (
        cli.replacing(f"{stem}.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, names(rows), restval="")
        writer.writeheader()
        writer.writerows(rows)
    with cli.replacing(f"{stem}.md") as temporary, open(temporary, "w", encoding="utf-8") as file:
        columns = names(summary)
        same = {
            name: summary[0].get(name, "")
            for name in columns[1:]
            if len(summary) > 1 and len({row.get(name, "") for row in summary}) == 1
        }
        if any(same.values()):
            file.write(
                ", ".join(f"{name} {value}" for name, value in same.items() if value) + "\n\n"
            )
        columns = [name for name in columns if name not in same]
        for cells in (
            columns,
            ["---"] * len(columns),
            *([row.get(name, "") for name in columns] for row in summary),
        ):
            file.write("| " + " | ".join(map(str, cells)) + " |\n")


def run(positional, overrides):
    if len(positional) != 1:
        raise UserError(
            "say which comparison: python scripts/lab/ablate.py NAME; known: "
            f"{', '.join(COMPARISONS)}"
        )
    cli.check_name("comparison", positional[0], COMPARISONS)
    options = cli.merge(AblateConfig, overrides)
    FAMILIES.update(variants.OWN_FAMILIES)
    if (options.base or options.data) and positional[0] not in variants.TRAINED:
        raise UserError(
            f"{positional[0]} trains nothing; leave out --base and --data, and give a --checkpoint"
        )
    comparison, stem_of = (
        COMPARISONS[positional[0]],
        lambda path: os.path.splitext(os.path.basename(path))[0],
    )
    name = "_".join(
        filter(
            None,
            (positional[0], stem_of(options.base), options.data and f"on_{stem_of(options.data)}"),
        )
    )
    stem, settings = os.path.join(options.out_dir, name), comparison.settings(options)
    (measure, common), table = comparison.measure(options), read_table(f"{stem}.csv")
    keys = [
        {name: str(value) for name, value in (setting | common).items()} for setting in settings
    ]
    done = lambda key: [
        row for row in table if all(row.get(name) == value for name, value in key.items())
    ]
    wanted = [
        (key, setting)
        for key, setting in zip(keys, settings)
        if str(next(iter(setting.values()))).startswith(options.only)
    ]
    if not wanted:
        raise UserError(f"only={options.only}: no setting of {positional[0]} begins so")
    # all seeds that were measured count, also those of other calls
    shown = dict.fromkeys(
        tuple((name, value) for name, value in key.items() if name != "seed") for key in keys
    )
    rows = lambda: [row for key in shown for row in done(dict(key))]
    if missing := [setting for key, setting in wanted if not done(key)]:
        print(
            f"to measure: {len(missing)} of {len(wanted)} settings, the others are in {stem}.csv",
            flush=True,
        )
    for number, (key, setting) in enumerate(wanted, 1):
        if done(key):
            continue
        figures = measure(setting)
        table = read_table(f"{stem}.csv")  # another process may have measured meanwhile
        table.append(
            key | {name: compare_training.rounded(value) for name, value in figures.items()}
        )
        write_tables(table, comparison.summary(rows()), stem)
        print(
            f"{number} of {len(wanted)}: {label(setting)} | "
            + ", ".join(f"{name} {table[-1][name]}" for name in list(figures)[:6]),
            flush=True,
        )
    write_tables(table, comparison.summary(rows()), stem)
    try:
        comparison.plot(rows(), name, f"{stem}.png")
    except ImportError as error:
        print(f"no plot: {error}")
    print(
        f"wrote {stem}.csv, {stem}.md"
        + (f" and {stem}.png" if os.path.exists(f"{stem}.png") else "")
    )


main = cli.command(AblateConfig, run, __doc__)
if __name__ == "__main__":
    cli.run(main)
