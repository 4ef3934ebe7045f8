"""README.md and learning.md: every command runs, every example gives what it says, every figure is that of its result file."""
import doctest
import json
import os
import re
import shlex
import subprocess

import pytest

import config
import diffusion
import inference
import train
from conftest import ROOT, TINY, run
from scripts import ablate, bench, data, evaluate, export, pictures, train_tokenizer
from utils import metrics, tales, texts

TEXT = {name: open(os.path.join(ROOT, name), encoding="utf-8").read() for name in ("README.md", "learning.md")}
MAIN = {"train.py": train.main, "inference.py": inference.main} | {
    f"scripts/{script.__name__.split('.')[-1]}.py": script.main
    for script in (ablate, bench, data, evaluate, export, pictures, train_tokenizer)}


# --- commands ---------------------------------------------------------------------------------------------------


def commands():
    """Command lines, in order: lines of blocks without a language, `python ...` within the text, and names of comparisons that
    link to their tables."""
    found = []
    for text in TEXT.values():
        for block, inline, name in re.findall(r"^```\n(.*?)^```$|`((?:python|pytest) [^`]+)`|\[`(\w+(?: --[^`]+)?)`\]\(artifacts/abl",
                                        re.sub(r"^```python\n.*?^```$", "", text, flags=re.S | re.M), re.S | re.M):
            inline = f"python scripts/ablate.py {name}" if name else inline
            lines = [re.sub(r"\s+", " ", inline)] if inline else block.splitlines()
            found += [re.sub(r"\s+#.*", "", line) for line in lines if re.match(r"python |pytest |torchrun |bash |pip ", line)]
    return [one for number, one in enumerate(found) if one == "python train.py" or one not in found[:number]]


SHORT = {  # appended to the words of a command: later flags win
    "train.py": [*TINY, "--short_rows", "0", "--final_samples", "0", "--eval_interval", "6"],
    "inference.py": ["--device", "cpu", "--frame-ms", "0", "--trace-every", "40", "--steps", "40", "--sampler", "confidence"],
    "scripts/ablate.py": ["--iters", "2", "--yardstick_iters", "2", "--num_samples", "2", "--device", "cpu", "--compile", "off"],
    "scripts/bench.py": ["--rounds", "1", "--device", "cpu", "--steps", "2", "--batches", "1"],
    "scripts/evaluate.py": ["--rows", "4", "--device", "cpu"],
    "scripts/data.py": [],
    "scripts/export.py": [],
    "scripts/pictures.py": [],
    "scripts/train_tokenizer.py": ["--vocab-size", "400"]}
INSTEAD = {"--dataset": "local.jsonl", "--num-stories": "300", "--tokens": "20K", "--gen-len": "300",  # these need the hub,
           "--num_samples": "2"}  # or hours
SHAPE = dict(n_layer=1, n_head=2, n_embd=16, batch_size=4, block_size=67)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run one after the other, with the texts and the runs that they speak of."""
    folder = tmp_path_factory.mktemp("docs")
    stories = tales.generate("docs", 400)
    (folder / "data").mkdir()
    (folder / "local.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    (folder / "prompts.txt").write_text("Once upon a time\nOne day\n")
    letters = " the end.\n\nROMEO:\nTo be, or not to be! What light; Friends, Now is the"  # of the prompts
    (folder / "data/shakespeare.txt").write_text("\n".join(stories) + letters)
    for name in ("my.txt", "data/stories_847.txt"):
        texts.write_documents(str(folder / name), stories)
    before = os.getcwd()
    os.chdir(folder)
    for name, words in (("ar", "tales --objective ar"), ("tales_256", "tales"), ("half_hour", "tales"), ("shakespeare", "shakespeare"),
                        ("spelling", "shakespeare --time_conditioning sinusoidal")):
        train.train(config.load([*words.split(), *TINY, "--name", name])[0], quiet=True)
    os.chdir(before)
    return folder


def test_every_command_runs(folder, monkeypatch, capsys):
    """One after the other, in a folder of their own, with a network and numbers of steps that take a second."""
    assert len(commands()) > 80
    for command in commands():
        words = shlex.split(command)
        if words[0] == "pip":
            assert os.path.exists(os.path.join(ROOT, words[-1]))
        elif words[0] == "bash":
            assert os.access(os.path.join(ROOT, words[1]), os.R_OK)
        elif words[0] == "pytest":
            names = re.findall(r"def (test_\w+)", open(os.path.join(ROOT, words[1]), encoding="utf-8").read())
            assert all(any(word in name for name in names) for word in words[words.index("-k") + 1].split(" or ")), command
        elif words[0] == "torchrun":
            config.load(words[words.index("train.py") + 1:])
        else:
            with monkeypatch.context() as patch:
                patch.chdir(folder)
                code, err = run_short(words[1], words[2:], patch, capsys)
                assert code == 0, (command, err)


def run_short(script, words, monkeypatch, capsys):
    """(exit code, stderr) of the script with the command's words, and what makes them short."""
    words = [INSTEAD.get(before, word) for before, word in zip(["", *words], words)]
    words = ["complementary" if word == "NAME" else word for word in words]
    short = SHORT[script] + (["--max_iters", "8"] if "--resume" in words else [])
    if script == "scripts/evaluate.py" and "--against" not in words:
        short = [*short, "--num_samples", "2"]
    if script == "scripts/bench.py" and not any(".pt" in word for word in words):  # they have tests of their own, and take long
        assert words[0] in bench.BENCHES
        monkeypatch.setitem(bench.BENCHES, words[0], (lambda name, options: config.preset(name), print, "tales"))
    if script == "scripts/ablate.py":
        comparison = ablate.COMPARISONS[words[0]]
        only = words[words.index("--only") + 1] if "--only" in words else ""
        first = lambda options: [setting for setting in comparison.settings(options)
                                 if str(next(iter(setting.values()))).startswith(only)][:1]
        monkeypatch.setitem(ablate.COMPARISONS, words[0], comparison._replace(settings=first))
        base = ablate.base_config
        monkeypatch.setattr(ablate, "base_config", lambda options: base(options) | SHAPE | {"eval_rows": 4, "final_rows": 4})
        if words[0] not in ablate.TRAINED and "--checkpoint" not in words:
            short = [*short, "--checkpoint", f"artifacts/models/{'spelling' if words[0] == 'spelling' else 'half_hour'}.best.pt"]
    if script == "scripts/pictures.py":
        short = ["--checkpoint", "artifacts/models/half_hour.best.pt"]
    monkeypatch.setattr(metrics, "SEARCHED", 5000)
    monkeypatch.setitem(diffusion.OBJECTIVES, "squared", diffusion.OBJECTIVES["masked"])
    code, _, err = run(MAIN[script], [*words, *short], monkeypatch, capsys)
    return code, err


@pytest.mark.parametrize("name", TEXT)
def test_links_lead_somewhere(name):
    """Pictures, tables and files that the text points to are part of the repository."""
    links = re.findall(r"\]\((?!http|#)([^)#]+)", TEXT[name])
    missing = [link for link in links if not os.path.exists(os.path.join(ROOT, link))]
    ignored = subprocess.run(["git", "check-ignore", "--no-index", *links], cwd=ROOT, capture_output=True, text=True)
    assert not missing and not ignored.stdout


def test_the_course_runs_as_it_stands(monkeypatch):
    """All examples of learning.md, in one go, and the entries that they add to the dictionaries are gone afterwards."""
    monkeypatch.chdir(ROOT)
    before = [(table, dict(table)) for table in (diffusion.SCHEDULES, diffusion.SAMPLERS, diffusion.OBJECTIVES)]
    try:
        found = doctest.testfile(os.path.join(ROOT, "learning.md"), module_relative=False)
        assert found.attempted > 40 and not found.failed
        assert {"sqrt", "leftmost", "squared"} <= {name for table, _ in before for name in table}
    finally:
        for table, old in before:
            table.clear()
            table.update(old)


def test_quoted_code_is_the_code():
    """Code in learning.md that names its file stands there like that."""
    quotes = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", TEXT["learning.md"], re.S)
    assert len(quotes) >= 2
    for file, code in quotes:
        assert code in open(os.path.join(ROOT, file), encoding="utf-8").read(), file


def parts(text):
    """(links to result files, text) of each paragraph, item of a list or row of a table that has some. A row also has those of
    the table's head; a list those of the paragraph before it, if that ends with a colon."""
    before = []
    for paragraph in re.split(r"\n\s*\n", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)):
        head = before if paragraph.startswith(("* ", "- ")) else []
        for number, part in enumerate(re.split(r"\n(?=\||\* |- )", paragraph)):
            own = re.findall(r"\]\((artifacts/[^)]+\.(?:md|csv|json))\)", part)
            head = own if part.startswith("|") and not number else head
            if own or head:
                yield own or head, part
        before = own if paragraph.endswith(":") else []


def figures(part, links):
    """Numbers with a decimal point in the part, and those of the result files that may stand there: where the first cell of a
    row is that of rows in the files too, up to a colon, theirs alone."""
    lines = [line for link in links for line in open(os.path.join(ROOT, link), encoding="utf-8")]
    first = lambda cell: re.split(r"[:,|]", cell)[0].strip()
    label = first(re.sub(r"`|\(.*?\)|\*\*", "", part.split("|")[1])) if part.startswith("|") else ""
    own = [line for line in lines if label and first(line.lstrip("| ")) == label]
    known = [float(x) for x in re.findall(r"(?<![\w.])-?\d+\.\d+(?:e[+-]?\d+)?", " ".join(own or lines))]
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)|\"[^\"]*\"|arXiv:\S+", " ", part)  # without code, links and what others claim
    return re.findall(r"(?<![\w.,])(\d+(?:,\d{3})*\.\d+)(?!\.?\d)(%?)", plain), known


@pytest.mark.parametrize("name", TEXT)
def test_figures_are_those_of_the_result_files(name):
    """Where the text links to results, every number with a decimal point stands there, rounded, or as a share if it is a
    percentage."""
    checked, wrong = 0, []
    for links, part in parts(TEXT[name]):
        numbers, known = figures(part, links)
        for number, percent in numbers:
            value, error = float(number.replace(",", "")), 0.5001 * 10.0 ** -len(number.split(".")[1])
            if not any(abs(abs(x) * scale - value) <= error for x in known for scale in ((1, 100) if percent else (1,))):
                wrong.append((number + percent, part[:100], links))
        checked += len(numbers)
    assert checked > 50 and not wrong, "\n".join(map(str, wrong))


def test_the_check_of_figures_can_fail():
    """A figure of another row, or of no row."""
    link = "artifacts/ablations/families.md"
    numbers, known = figures("| masked | 1.522 |", [link])
    assert numbers == [("1.522", "")] and 1.522 not in known and 1.997 in known
    assert 1.522 in figures("one 1.522", [link])[1] and 1.2345 not in figures("one 1.2345", [link])[1]
    table = "artifacts/ablations/samplers.csv"
    assert figures("| `factor:f` | 90.5% (0.3) |", [table])[1] != figures("| `threshold:p` | 96.0% |", [table])[1]
    assert [links for links, _ in parts("See [it](artifacts/a.csv):\n\n* one 1.5\n* [two](artifacts/b.md) 2.5\n\nNo 3.5")] == [
        ["artifacts/a.csv"], ["artifacts/a.csv"], ["artifacts/b.md"]]
