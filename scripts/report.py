"""Fill the figures and tables of the documents from the result files of artifacts/.

    python scripts/report.py            # writes them into the pages
    python scripts/report.py --check    # writes nothing, and says which page differs

A figure is a link to a file, and a comment that says which cell of it is meant, and how it is
written:

    [97.5%](artifacts/benchmarks/tales_30_minutes.json)<!-- samples / valid .1% -->
    [2.206 ± 0.021](artifacts/ablations/families.csv)<!-- masked / bound ± se_rows .3f -->

Before the last slash stands a path of a .json, or the conditions that one row of a .csv meets, with
"; " between them: the first cell, or a column and its value. Behind it stand a key or column and a
format of Python's. A table stands between `<!-- table NAME -->` and `<!-- end -->`: a function of
TABLES (scripts/lab/tables.py) makes its lines.
"""

import os
import posixpath
import re
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from scripts.lab.results import ROOT, cell
from scripts.lab.tables import TABLES
from utils import cli
from utils.cli import UserError, field

PAGES = ("README.md", "learning.md", "artifacts/README.md", "artifacts/claims.md")


@dataclass(frozen=True)
class ReportConfig:
    check: bool = field(False, "write nothing; exit code 2 where a page differs", "what")


# --- pages ----------------------------------------------------------------------------------------

FIGURE = re.compile(r"\[([^\]\[]*)\]\((\S+?\.(?:csv|json))\)<!-- ([^>]+?) -->")
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.S)
MARK = re.compile(r"<!--.*?-->", re.S)


def fill(page, text):
    """The text of a page with its figures and tables as the result files have them."""

    def figure(match):
        path = posixpath.join(posixpath.dirname(page), match[2])
        file = posixpath.relpath(posixpath.normpath(path), "artifacts")
        return f"[{cell(file, match[3])}]({match[2]})<!-- {match[3]} -->"

    def lines(match):
        cli.check_name("table", match[2], TABLES)
        return match[1] + "\n".join(["", *TABLES[match[2]](), "", match[3]])

    if stray := MARK.search(FIGURE.sub("", TABLE.sub("", text))):
        raise UserError(f"{page}: {stray[0]} marks neither a figure nor a table")
    return TABLE.sub(lines, FIGURE.sub(figure, text))


def differing():
    """{page: its text as it should be} of the pages that differ from their result files."""
    found = {}
    for page in PAGES:
        with open(os.path.join(ROOT, page), encoding="utf-8") as file:
            text = file.read()
        if (filled := fill(page, text)) != text:
            found[page] = filled
    return found


def run(positional, overrides):
    options, found = cli.merge(ReportConfig, overrides), differing()
    if options.check and found:
        raise UserError(
            f"{', '.join(found)} and the result files differ; write them: python scripts/report.py"
        )
    for page, text in found.items():
        with (
            cli.replacing(os.path.join(ROOT, page)) as temporary,
            open(temporary, "w", encoding="utf-8") as file,
        ):
            file.write(text)
        print(f"wrote {page}")
    if not found:
        print("every figure and table is that of its result file")


main = cli.command(ReportConfig, run, __doc__, unexpected="It writes all pages, or none")
if __name__ == "__main__":
    cli.run(main)
