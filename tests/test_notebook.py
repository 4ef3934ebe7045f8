"""first_look.ipynb runs from top to bottom, and says what its text says."""

import json
import os
import re

import pytest
from conftest import ROOT

NOTEBOOK = os.path.join(ROOT, "first_look.ipynb")


@pytest.fixture(scope="module")
def cells():
    """What each cell of code gives, run in a kernel of its own in the repository: a list of (what
    it printed, its result by MIME type)."""
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": ROOT}}
    ).execute()
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not any(output.get("name") == "stderr" for output in cell.outputs), cell.outputs
            printed = "".join(output.get("text", "") for output in cell.outputs)
            results = [output.data for output in cell.outputs if "data" in output]
            found.append((printed, results[0] if results else {}))
    return found


def test_the_notebook_tells_what_it_says(cells):
    text = "".join(printed for printed, _ in cells)
    traces = [result["text/html"] for _, result in cells if "text/html" in result]
    assert len(traces) == 2 and all(trace.startswith("<iframe srcdoc=") for trace in traces)
    assert re.search(r"m = 0.2: Once.* ▢.*\n", text) and "m = 0.8: " in text
    (name, sure), *unsure = re.findall(r"^(\S+) (\d\.\d\d)(?:   \S+ \d\.\d\d){3}$", text, re.M)
    assert name == "Tom" and float(sure) > 0.9, "it sees the name elsewhere"
    assert len(unsure) == 3 and all(float(share) < 0.5 for _, share in unsure)
    good, wrong = re.findall(r"bound (\S+) ± \S+ nats, exact (\S+):", text)
    assert float(good[0]) > float(good[1]) and float(wrong[0]) > float(good[0]) + 2
    assert wrong[1] == "inf"
    states = re.findall(r"^ *(\d+) NFE \| (.*)", text, re.M)
    assert [int(nfe) for nfe, _ in states] == list(range(7))
    assert "░" in states[5][1] and "░" not in states[6][1]
    shares = dict(re.findall(r"^(\S+.*?) +\S+ NFE +(\d+)% valid", text, re.M))
    assert len(shares) == 6 and int(shares["random, 4"]) < 10
    assert int(shares["entropy_bounded:0.1"]) > 70 and int(shares["first_hitting"]) > 70
    assert cells[-1][0].startswith("Once upon a time, there was a little dog")


def test_the_notebook_has_no_outputs():
    """They would be figures without a command; a run shows them."""
    with open(NOTEBOOK, encoding="utf-8") as file:
        code = [cell for cell in json.load(file)["cells"] if cell["cell_type"] == "code"]
    assert 8 <= len(code) <= 12
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
