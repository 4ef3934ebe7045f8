"""The tables of the pages, each a function of no argument that gives its lines: what
scripts/report.py fills in. A new one is a function and an entry of TABLES."""

import functools
from operator import itemgetter

from scripts.lab import pair_tables, story_tables
from scripts.lab.results import (
    best_at_most,
    listed,
    load,
    mean,
    rows_of,
    runs,
    share,
    source,
    table,
)


def samplers():
    """Share of valid stories of each sampler, at its best setting of at most so much NFE."""
    file, groups, limits = "ablations/samplers.csv", {}, (16, 32, 66, 256)
    for row in load(file):
        if row["top_p"] == "1.0" and row["cache"] == "none":
            blocks = f", blocks of {row['decode_block']}" if row["decode_block"] != "0" else ""
            groups.setdefault(row["sampler"].partition(":")[0] + blocks, []).append(row)
    rows = [
        [f"`{name}`", *(best_at_most(rows, limit) for limit in limits)]
        for name, rows in groups.items()
    ]
    return table(["sampler", *(f"{limit} NFE" for limit in limits)], rows) + source(file)


def sampled():
    """The default sampler with the likeliest tokens alone, and in blocks with caches."""
    file = "ablations/samplers.csv"
    rows = rows_of(file, "entropy_bounded:0.1; top_p 1.0; decode_block 0; cache none")
    name = lambda row: (
        f"top-p {float(row['top_p']):g}"
        + (f", blocks of {row['decode_block']}" if row["decode_block"] != "0" else "")
        + (f", {row['cache']} cache" if row["cache"] != "none" else "")
    )
    columns = {
        "default sampler": name,
        "NFE": lambda row: f"{float(row['nfe']):.1f}",
        "valid": share("valid"),
        "log-probability": itemgetter("log_prob"),
        "different pairs of words": itemgetter("distinct_2"),
    }
    return listed(file, columns, rows + [row for row in load(file) if row["top_p"] != "1.0"])


TEMPERATURES = {  # valid, different and likely samples over the temperature
    "sampler": lambda row: f"`{row['sampler']}`",
    "temperature": itemgetter("temperature"),
    "valid": share("valid"),
    "different": share("distinct"),
    "log-probability": itemgetter("log_prob"),
}
SPELLING = {  # share of words that the training text has, by sampler
    "sampler": itemgetter("sampler"),
    "steps": itemgetter("steps"),
    "temperature": lambda row: f"{float(row['temperature']):g}",
    "top-p": lambda row: f"{float(row['top_p']):g}",
    "NFE": lambda row: f"{float(row['nfe']):.0f}",
    "words": share("words"),
    "different words": itemgetter("distinct_1"),
}
ORDER = {  # whether the most frequent tokens are unmasked first
    "sampler": itemgetter("sampler"),
    "temperature": lambda row: f"{float(row['temperature']):g}",
    "of the first tenth": share("early"),
    "of all": share("all"),
}


def tales():
    """What `tales` learns in a number of minutes."""
    minutes = (f"{minutes}_minutes{end}" for minutes in (8, 30) for end in ("", "_float32"))
    what = {
        "steps of the best checkpoint": lambda r: f"{r['step']:,}",
        "NELBO, nats a token (± s.e. over rows, over masks)": lambda r: (
            f"{r['bound_nats_per_token']:.4f} (± {r['bound_se_rows']:.4f}, "
            f"± {r['bound_se_masks']:.4f})"
        ),
        "NELBO, nats a story": lambda r: f"{r['bound_nats_per_story']:.2f}",
        "exact -log p of the same stories": lambda r: f"{r['exact_nats_per_story']:.2f}",
        "above it": lambda r: f"{r['excess_over_exact']:.1%}",
        "samples that are whole valid stories": lambda r: f"{r['samples']['valid']:.1%}",
        "sentences that the grammar has": lambda r: f"{r['samples']['grammatical']:.1%}",
        "log-probability of the valid samples": lambda r: f"{r['samples']['log_prob']:.2f}",
        "of true ones, minus the entropy": lambda r: f"{-r['entropy_nats_per_story']:.2f}",
        "longest copy of training text, tokens": lambda r: (
            f"{r['samples']['longest_copy_mean']:.1f}"
        ),
        "the same of held-out stories": lambda r: f"{r['reference']['longest_copy_mean']:.1f}",
    }
    return runs({n.replace("_", " "): f"benchmarks/tales_{n}.json" for n in minutes}, what)


def nelbo(rows):
    """Mean bound and its standard error over rows, with three digits behind the point, or four."""
    digits = 3 if mean(rows, "bound") > 1 else 4
    return f"{mean(rows, 'bound'):.{digits}f} ± {mean(rows, 'se_rows'):.{digits}f}"


def trained(file):
    """Training runs of a comparison: means over seeds; what is the same in all stands above."""
    groups = {}
    for row in load(file):
        groups.setdefault(row["variant"], []).append(row)
    columns = {
        "window": lambda rows: rows[0].get("block_size", ""),
        "steps": lambda rows: f"{int(rows[0]['steps']):,}",
        "rows a step": lambda rows: rows[0]["rows_a_step"],
        "seeds": lambda rows: str(len(rows)),
        "NELBO, nats a token": nelbo,
        "bits a character": lambda rows: f"{mean(rows, 'bits_per_character'):.3f}",
        "above exact": lambda rows: (
            f"{float(rows[0]['above_exact']):.1%}" if rows[0].get("above_exact") else ""
        ),
        "minutes": lambda rows: f"{mean(rows, 'minutes'):.2f}",
        "parameters": lambda rows: f"{int(rows[0]['parameters']):,}",
    }
    found = {name: [of(rows) for rows in groups.values()] for name, of in columns.items()}
    same = {name: cells[0] for name, cells in found.items() if len(set(cells)) == 1}
    found = {name: cells for name, cells in found.items() if name not in same}
    above = ", ".join(f"{name} {value}" for name, value in same.items() if value)
    lines = table(["", *found], zip(groups, *found.values()))
    return [f"In all rows: {above}.", "", *lines, *source(file)] if above else lines + source(file)


def others():
    """All other comparisons of training runs, each behind a line that opens."""
    lines = []
    for name in OTHERS:
        shown = trained(f"ablations/{name}.csv")
        picture = f"![NELBO over rows and minutes](ablations/{name}.png)"
        lines += [f"<details><summary>{name}</summary>", "", *shown, "", picture]
        lines += ["", "</details>", ""]
    return lines[:-1]


OTHERS = (
    "optimizer",
    "weighting",
    "schedule",
    "time_conditioning",
    "batch_size",
    "ema",
    "diffusion_steps",
    "complementary",
    "time_sampling",
    "attention",
    "window",
    "recipe",
    "recipe_tales",
    "recipe_on_stories_847",
    "weighting_on_stories_847",
    "long/weighting_on_stories_847",
    "expected_loss",
)


def steps():
    """Speed of a training step of three shapes."""
    rows, files = [], [f"benchmarks/train_{name}_cpu.json" for name in SHAPES]
    for file in files:
        [report] = load(file)
        for label, v in report["variants"].items():
            rows.append(
                (
                    f"`{report['preset']}`, {v['rows_a_step']} rows: {label}",
                    f"{1000 * v['median_step_seconds']:,.0f}",
                    f"{v['tokens_per_second']:,.0f}",
                    f"{v['speed_up']:.2f}",
                    f"{v['share_of_matrix_rate']:.1%}",
                    f"{v['peak_memory_gb']:.1f}",
                )
            )
    head = ["", "ms a step", "tokens/s", "speed-up", "of the matrix rate", "GB"]
    return table(head, rows) + source(*files)


SHAPES = ("stories", "shakespeare", "tales")


def growth(file):
    """How a step grows, and the exponents."""
    [report] = load(file)
    names = dict(seq_len="window", batch_size="rows", n_embd="width", data="corpus, tokens")
    rows = [
        (
            names[row["setting"]],
            f"{row['value']:,}",
            f"{1000 * row['median_step_seconds']:,.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['share_of_matrix_rate']:.1%}",
            f"{row['peak_memory_gb']:.2f}",
        )
        for row in report["rows"]
    ]
    exponents = [
        (names[setting], f"{found['median_step_seconds']:z.2f}", f"{found['step_memory_gb']:z.2f}")
        for setting, found in report["exponents"].items()
    ]
    head = ["", "value", "ms a step", "tokens/s", "of the matrix rate", "GB"]
    memory = f"of memory beyond the {report['floor_gb']:.2f} GB of the smallest step"
    lines = table(["exponent over the last three", "of seconds", memory], exponents)
    return [*table(head, rows), "", *lines, *source(file)]


def sampling(file):
    """Speed of sampling, all of a benchmark."""
    [report] = load(file)
    head = ["batch", "sampler", "NFE", "seconds", "tokens/s", "speed-up"]
    rows = [
        (
            row["batch"],
            row["sampler"],
            row["nfe"],
            f"{row['median_seconds']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['speed_up']:.1f}",
        )
        for row in report["rows"]
    ]
    return table(head, rows) + source(file)


def stories_long():
    """Validity of the texts of 256 tokens by sampler."""
    files = [f"benchmarks/tales_256_{name.replace(':', '_')}.json" for name in LONG]
    rows = []
    for name, file in zip(LONG, files):
        found = load(file)["samples"]
        nfe = f"{found['nfe_a_sample']:.1f}"
        rows.append((f"`{name}`", nfe, found["samples"], f"{found['valid']:.1%}"))
    return table(["sampler", "NFE", "whole stories", "valid"], rows) + source(*files)


LONG = ("entropy_bounded", "local_entropy:64", "local_entropy:48", "local_entropy:32")

TABLES = {
    "samplers": samplers,
    "puzzles": functools.partial(pair_tables.puzzles, "ablations/puzzles.csv"),
    "puzzles_of_9": functools.partial(pair_tables.puzzles, "ablations/sudoku9/puzzles.csv"),
    "difficulty": pair_tables.difficulty,
    "puzzle_families": pair_tables.puzzle_families,
    "guidance": functools.partial(listed, "ablations/guidance.csv", pair_tables.GUIDANCE),
    "padding": functools.partial(listed, "ablations/padding_tales_asked.csv", pair_tables.PADDING),
    "adapt": functools.partial(pair_tables.adapt, "ablations/adapt.csv"),
    "adapt_stories": functools.partial(pair_tables.adapt, "ablations/adapt_on_stories_847.csv"),
    "canvas": functools.partial(pair_tables.canvas, "ablations/canvas_tales.csv"),
    "sampled": sampled,
    "temperatures": functools.partial(listed, "ablations/temperature.csv", TEMPERATURES),
    "spelling": functools.partial(listed, "ablations/spelling.csv", SPELLING),
    "order": functools.partial(listed, "ablations/order.csv", ORDER),
    "tales": tales,
    "hour": story_tables.hour,
    "longer": story_tables.longer,
    "written": story_tables.written,
    "stories": functools.partial(listed, "ablations/stories.csv", story_tables.STORIES),
    "long_stories": functools.partial(
        listed, "ablations/long_stories.csv", story_tables.LONG_STORIES
    ),
    "block_lengths": story_tables.block_lengths,
    "wikitext": story_tables.wikitext,
    "recipe": functools.partial(trained, "ablations/recipe_shakespeare.csv"),
    "families": functools.partial(trained, "ablations/families.csv"),
    "families_tales": functools.partial(trained, "ablations/families_tales.csv"),
    "families_stories": functools.partial(trained, "ablations/families_on_stories_847.csv"),
    "overfitting": functools.partial(trained, "ablations/ar_vs_diffusion_on_stories_847.csv"),
    "others": others,
    "steps": steps,
    "growth": functools.partial(growth, "benchmarks/growth_cpu.json"),
    "growth_float32": functools.partial(growth, "benchmarks/growth_cpu_float32.json"),
    "sampling_long": functools.partial(sampling, "benchmarks/sample_256_cpu.json"),
    "stories_long": stories_long,
    "sampling": functools.partial(sampling, "benchmarks/sample_tales_cpu.json"),
}
