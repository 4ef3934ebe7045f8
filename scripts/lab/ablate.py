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
from scripts.lab import (
    compare_adapt,
    compare_canvas,
    compare_padding,
    compare_puzzles,
    compare_requests,
    compare_samplers,
    compare_stories,
    compare_training,
    figures,
    variants,
)
from utils import cli
from utils.cli import UserError, field


@dataclass(frozen=True)
class AblateConfig:
    checkpoint: str = field(
        "", "of the comparisons that need a trained model (default: the newest run's best)", "what"
    )
    judge: str = field("", "autoregressive model that scores stories: a checkpoint, or hf:NAME")
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
    minutes: float = field(
        0.0, "minutes of each training run, instead of a number of steps", low=0, high=10**6
    )
    published_iters: int = field(5000, "steps of the micro-dLLMs' recipe (recipe)", low=1)
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


in_bits = partial(figures.bound_over_cost, bits=True)  # of several tokenizers
PLOTS = {"ar_vs_diffusion": figures.overfitting, "small": in_bits, "own_text": in_bits}

COMPARISONS = {
    "samplers": Comparison(
        compare_samplers.sampler_settings,
        compare_samplers.judge_samplers,
        figures.quality_against_cost,
    ),
    "puzzles": Comparison(
        compare_puzzles.puzzle_settings, compare_puzzles.judge_puzzles, figures.solved
    ),
    "puzzle_difficulty": Comparison(
        compare_puzzles.difficulty_settings, compare_puzzles.judge_puzzles, figures.by_difficulty
    ),
    "puzzle_families": Comparison(
        compare_puzzles.family_settings, compare_puzzles.judge_families, figures.by_family
    ),
    "guidance": Comparison(
        compare_requests.guidance_settings, compare_requests.judge_requests, figures.over_guidance
    ),
    "adapt": Comparison(
        compare_adapt.adapt_settings, compare_adapt.measure_adapt, figures.of_adapted
    ),
    "canvas": Comparison(
        compare_canvas.canvas_settings, compare_canvas.judge_canvas, figures.of_canvas
    ),
    "padding": Comparison(
        compare_padding.padding_settings, compare_padding.measure_padding, figures.of_padding
    ),
    "temperature": Comparison(
        compare_samplers.temperature_settings,
        compare_samplers.judge_samplers,
        figures.over_temperature,
    ),
    "stories": Comparison(
        compare_stories.story_settings, compare_stories.judge_stories, figures.stories
    ),
    "block_lengths": Comparison(
        compare_stories.block_settings,
        compare_stories.judge_blocks,
        partial(figures.stories, usual=compare_stories.BLOCKS_USUAL),
    ),
    "long_stories": Comparison(
        compare_stories.long_settings, compare_stories.judge_long, figures.along_the_text
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
        PLOTS.get(name, figures.bound_over_cost),
        compare_training.over_seeds,
    )
    for name in variants.TRAINED
}


TRAIN_TOO = ("adapt", "canvas", "padding", "puzzle_families")

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


def table_name(comparison, options):
    """NAME, or NAME_BASE_on_DATA where the base or the text is another."""
    stem = lambda path: os.path.splitext(os.path.basename(path))[0]
    data = options.data and f"on_{stem(options.data)}"
    return "_".join(filter(None, (comparison, stem(options.base), data)))


class Table:
    """What has been measured: rows (dicts of str) in a file that other processes write too."""

    def __init__(self, stem, summary):
        self.stem, self.summary, self.rows = stem, summary, read_table(f"{stem}.csv")

    def of(self, key):
        """Its rows that have what key (dict) says."""
        return [row for row in self.rows if key.items() <= row.items()]

    def shown(self, keys):
        """Its rows of these settings, in order: of all seeds that were measured, also those of
        other calls."""
        without_seed = lambda key: tuple(item for item in key.items() if item[0] != "seed")
        return [row for key in dict.fromkeys(map(without_seed, keys)) for row in self.of(dict(key))]

    def write(self, keys):
        write_tables(self.rows, self.summary(self.shown(keys)), self.stem)

    def add(self, row, keys):
        self.rows = read_table(f"{self.stem}.csv")  # another process may have measured meanwhile
        self.rows.append(row)
        self.write(keys)


def compare(name, comparison, options, stem):
    """Measure the settings of a comparison that its table lacks; returns the rows of all."""
    settings = comparison.settings(options)
    (measure, common), table = comparison.measure(options), Table(stem, comparison.summary)
    keys = [{name: str(value) for name, value in (one | common).items()} for one in settings]
    begins = lambda setting: str(next(iter(setting.values()))).startswith(options.only)
    wanted = [(key, setting) for key, setting in zip(keys, settings) if begins(setting)]
    if not wanted:
        raise UserError(f"only={options.only}: no setting of {name} begins so")
    if missing := sum(not table.of(key) for key, _ in wanted):
        print(
            f"to measure: {missing} of {len(wanted)} settings, the others are in {stem}.csv",
            flush=True,
        )
    for number, (key, setting) in enumerate(wanted, 1):
        if table.of(key):
            continue
        found = measure(setting)
        row = key | {name: compare_training.rounded(value) for name, value in found.items()}
        table.add(row, keys)
        first = ", ".join(f"{name} {row[name]}" for name in list(found)[:6])
        print(f"{number} of {len(wanted)}: {label(setting)} | {first}", flush=True)
    table.write(keys)
    return table.shown(keys)


def run(positional, overrides):
    if len(positional) != 1:
        raise UserError(
            "say which comparison: python scripts/lab/ablate.py NAME; known: "
            f"{', '.join(COMPARISONS)}"
        )
    [name] = positional
    cli.check_name("comparison", name, COMPARISONS)
    options = cli.merge(AblateConfig, overrides)
    if (options.base or options.data) and name not in (*variants.TRAINED, *TRAIN_TOO):
        raise UserError(
            f"{name} trains nothing; leave out --base and --data, and give a --checkpoint"
        )
    title = table_name(name, options)
    stem = os.path.join(options.out_dir, title)
    rows = compare(name, COMPARISONS[name], options, stem)
    try:
        COMPARISONS[name].plot(rows, title, f"{stem}.png")
    except ImportError as error:
        print(f"no plot: {error}")
    plot = f" and {stem}.png" if os.path.exists(f"{stem}.png") else ""
    print(f"wrote {stem}.csv, {stem}.md{plot}")


main = cli.command(AblateConfig, run, __doc__)
if __name__ == "__main__":
    cli.run(main)
