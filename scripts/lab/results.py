"""The result files of artifacts/, their cells, and Markdown made of them."""

import csv
import functools
import json
import os

from utils import cli
from utils.cli import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# --- result files ---------------------------------------------------------------------------------


@functools.cache
def load(file):
    """A result file below artifacts/: a list of dicts of str (.csv), what the .json holds, or a
    text (.txt)."""
    path = os.path.join(ROOT, "artifacts", file)
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            read = {".csv": lambda file: list(csv.DictReader(file)), ".json": json.load}
            return read.get(os.path.splitext(file)[1], lambda file: file.read())(stream)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the results {path}: {cli.reason(error)}") from None


def rows_of(file, conditions):
    """The rows (list of dicts) of a .csv that meet the conditions of a figure's comment."""
    rows = load(file)
    for condition in filter(None, conditions.split("; ")):
        column = next((name for name in rows[0] if condition.startswith(f"{name} ")), None)
        value = condition.removeprefix(f"{column} ")
        column = column or next(iter(rows[0]))
        rows = [row for row in rows if row.get(column) == value]
        if not rows:
            raise UserError(f"{file} has no row with {condition}")
    return rows


def cell(file, place):
    """A number of a result file, as a figure's comment `place` names and formats it (str): of rows
    that differ in their seeds the mean."""
    where, _, what = place.rpartition(" / ")
    names, _, form = what.rpartition(" ")
    names = names.split(" ± ")
    try:
        if file.endswith(".csv"):
            rows = rows_of(file, where)
            if len({row.get("seed") for row in rows}) < len(rows):
                raise UserError(f'"{place}" of {file}: {len(rows)} rows are meant')
            found = {name: mean(rows, name) for name in names}
        else:
            found = load(file)
            for key in filter(None, where.split(" / ")):
                found = found[int(key)] if isinstance(found, list) else found[key]
        return " ± ".join(format(float(found[name]), form) for name in names)
    except (IndexError, KeyError, TypeError, ValueError):
        raise UserError(f'"{place}" of {file}: no such number, or no format of one') from None


def mean(rows, name):
    """Mean of a column."""
    return sum(float(row[name]) for row in rows) / len(rows)


# --- Markdown -----------------------------------------------------------------------------------


def table(head, rows):
    """Lines of a Markdown table."""
    lines = (head, ["---"] * len(head), *rows)
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def source(*files):
    """Lines below a table: which files it is made from, and where these come from."""
    lines = [""]
    for file in files:
        [row] = rows_of("sources.csv", file)
        link = f"[{os.path.basename(file)}]({file})"
        commands = ", ".join(f"`{command}`" for command in row["command"].split("; "))
        lines.append(f"* {link}: {commands}; {row['machine']}, {row['date']}")
    return lines


def listed(file, columns, rows=None):
    """A line for each row of the file; columns: {heading: function from a row to its cell}."""
    cells = [[of(row) for of in columns.values()] for row in (rows or load(file))]
    return table(list(columns), cells) + source(file)


def runs(files, what):
    """A column for each report of a run {heading: file}, a line for each of what {label: function
    from a report to its cell}."""
    reports = [load(file) for file in files.values()]
    rows = [[label, *map(of, reports)] for label, of in what.items()]
    return table(["", *files], rows) + source(*files.values())


def best_at_most(rows, limit, what="valid"):
    """The largest share, of valid stories say, of a setting with at most so much NFE, and its
    number."""
    found = [row for row in rows if float(row["nfe"]) <= limit]
    if not found:
        return "–"
    best = max(found, key=lambda row: float(row[what]))
    number = best["sampler"].partition(":")[2]
    return f"{float(best[what]):.1%}" + (f" ({number})" if number else "")


def share(name):
    """A column that is a share, in percent."""
    return lambda row: f"{float(row[name]):.1%}"
