"""README.md, learning.md and the pages of artifacts/: every command runs, every example gives what
it says, every figure is that of its result file."""

import doctest
import json
import os
import posixpath
import re
import shlex
import shutil
import subprocess
import tomllib

import pytest
import test_maths
import torch
import toy
import yaml
from conftest import ROOT, TINY, load, run

import config
import diffusion
import inference
import train
from model import Transformer
from scripts import data, evaluate, export, playground, report, train_tokenizer
from scripts.lab import ablate, bench, front, pictures, results, variants
from utils import corpus, exported, metrics, pairs, policies, runtime, settings, tales, texts
from utils.built_in import BUILT_IN
from utils.families import FAMILIES

TEXT = {name: open(os.path.join(ROOT, name), encoding="utf-8").read() for name in report.PAGES}
MAIN = {"train.py": train.main, "inference.py": inference.main} | {
    f"{script.__name__.replace('.', '/')}.py": script.main
    for script in (
        ablate,
        bench,
        data,
        evaluate,
        export,
        front,
        pictures,
        playground,
        report,
        train_tokenizer,
    )
}


# --- commands -------------------------------------------------------------------------------------


def tracked(*patterns):
    """Files of the repository (list of str)."""
    words = ["git", "ls-files", *patterns]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.split()


def commands():
    """Command lines, in order: lines of blocks without a language, `python ...` within the text,
    and names of comparisons that link to their tables."""
    found = []
    for text in TEXT.values():
        for block, inline, name in re.findall(
            r"^```\n(.*?)^```$|`((?:python|pytest) [^`]+)`"
            r"|\[`(\w+(?: --[^`]+)?)`\]\((?:artifacts/)?abl",
            re.sub(r"^```python\n.*?^```$", "", text, flags=re.S | re.M),
            re.S | re.M,
        ):
            inline = f"python scripts/lab/ablate.py {name}" if name else inline
            lines = [re.sub(r"\s+", " ", inline)] if inline else block.splitlines()
            found += [
                re.sub(r"\s+#.*| > \S+$", "", line)
                for line in lines
                if re.match(r"python |pytest |torchrun |bash |pip ", line)
            ]
    return [
        one
        for number, one in enumerate(found)
        if one == "python train.py" or one not in found[:number]
    ]


SHORT = {  # appended to the words of a command: later flags win
    "train.py": [*TINY, "--short_rows", "0", "--eval_interval", "6"],
    "inference.py": [
        *"--device cpu --frame-ms 0 --trace-every 40 --steps 40 --sampler confidence".split()
    ],
    "scripts/lab/ablate.py": [
        *"--iters 2 --published_iters 2 --num_samples 2 --device cpu --compile off".split()
    ],
    "scripts/lab/bench.py": ["--rounds", "1", "--device", "cpu", "--steps", "2", "--batches", "1"],
    "scripts/evaluate.py": ["--rows", "4", "--device", "cpu"],
    "scripts/data.py": [],
    "scripts/export.py": [],
    "scripts/playground.py": ["--device", "cpu"],
    "scripts/lab/front.py": [],
    "scripts/report.py": ["--check"],
    "scripts/lab/pictures.py": [],
    "scripts/train_tokenizer.py": ["--vocab-size", "400"],
}
# of options that need the hub, or hours
INSTEAD = {
    "--dataset": "local.jsonl",
    "--num-stories": "300",
    "--tokens": "20K",
    "--gen-len": "300",
    "--num_samples": "2",
}
SHAPE = dict(n_layer=1, n_head=2, n_embd=16, batch_size=4, seq_len=67)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run one after the other, with the texts and the runs that they speak
    of."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(os.path.join(ROOT, "artifacts/pretrained"), folder / "artifacts/pretrained")
    stories = tales.generate("docs", 400)
    (folder / "data").mkdir()
    (folder / "local.jsonl").write_text(
        "".join(json.dumps({"text": story}) + "\n" for story in stories)
    )
    (folder / "prompts.txt").write_text("Once upon a time\nOne day\n")
    asked = (pairs.asked(f"What comes after {n}?", f"It is {n + 1}.") for n in range(200))
    pairs.write(str(folder / "pairs.jsonl"), asked)
    letters = "\n\nROMEO:\nTo be, or not to be! What light; Friends, Now is the"  # of the prompts
    (folder / "data/shakespeare.txt").write_text("\n".join(stories) + letters)
    for name in ("my.txt", "data/stories_847.txt"):
        texts.write_documents(str(folder / name), stories)
    before = os.getcwd()
    os.chdir(folder)
    for name, words in (
        ("ar", "tales --objective ar"),
        ("tales_256", "tales"),
        ("half_hour", "tales"),
        ("demo", "tales"),
        ("sudoku", "sudoku"),
        ("shakespeare", "shakespeare"),
        ("spelling", "shakespeare --time_conditioning sinusoidal"),
    ):
        train.train(load([*words.split(), *TINY, "--name", name])[0], quiet=True)
    os.chdir(before)
    return folder


def test_every_command_runs(folder, monkeypatch, capsys):
    """One after the other, in a folder of their own, with a network and numbers of steps that take
    a second."""
    assert len(commands()) > 80
    for command in commands():
        words = shlex.split(command)
        if words[0] == "pip":
            assert os.path.exists(os.path.join(ROOT, words[-1]))
        elif words[0] == "bash":
            assert os.access(os.path.join(ROOT, words[1]), os.R_OK)
        elif words[0] == "pytest":
            names = re.findall(
                r"def (test_\w+)", open(os.path.join(ROOT, words[1]), encoding="utf-8").read()
            )
            assert all(
                any(word in name for name in names)
                for word in words[words.index("-k") + 1].split(" or ")
            ), command
        elif words[0] == "torchrun":
            load(words[words.index("train.py") + 1 :])
        else:
            with monkeypatch.context() as patch:
                patch.chdir(folder)
                code, err = run_short(words[1], words[2:], patch, capsys)
                assert code == 0, (command, err)


def example(name):
    """The class of that name in the course's examples."""
    source = re.search(rf"^>>> (class {name}\(.*?\n)>>>", TEXT["learning.md"], re.S | re.M)[
        1
    ].replace("\n... ", "\n")
    space = {"diffusion": diffusion}
    exec(source, space)
    return space[name]


def run_short(script, words, monkeypatch, capsys):
    """(exit code, stderr) of the script with the command's words, and what makes them short."""
    words = [INSTEAD.get(before, word) for before, word in zip(["", *words], words)]
    words = ["complementary" if word == "NAME" else word for word in words]
    short = SHORT[script] + (["--max_iters", "8"] if "--resume" in words else [])
    if script == "scripts/evaluate.py" and "--against" not in words:
        short = [*short, "--num_samples", "2"]
    # they have tests of their own, and take long
    if script == "scripts/lab/bench.py" and not any(".pt" in word for word in words):
        assert words[0] in bench.BENCHES
        monkeypatch.setitem(
            bench.BENCHES, words[0], (lambda name, options: settings.preset(name), print, "tales")
        )
    if "--minutes" in words:
        short = [*short, "--minutes", "0.005"]
    if script == "scripts/lab/ablate.py":
        comparison = ablate.COMPARISONS[words[0]]
        only = words[words.index("--only") + 1] if "--only" in words else ""
        first = lambda options: [
            setting
            for setting in comparison.settings(options)
            if str(next(iter(setting.values()))).startswith(only)
        ][:1]
        # each kind of figure once on each base; they take as long as the rest
        kind = getattr(comparison.plot, "__name__", words[0])
        drawn = (
            "_".join(
                [kind, *words[words.index("--base") + 1 :][:1]] if "--base" in words else [kind]
            )
            + ".drawn"
        )
        plot = comparison.plot if not os.path.exists(drawn) else lambda *_: None
        open(drawn, "w").close()
        monkeypatch.setitem(
            ablate.COMPARISONS, words[0], comparison._replace(settings=first, plot=plot)
        )
        base = variants.base_config
        monkeypatch.setattr(
            variants,
            "base_config",
            lambda options: base(options) | SHAPE | {"eval_rows": 4, "final_rows": 4},
        )
        if words[0] not in variants.TRAINED and "--checkpoint" not in words:
            short = [
                *short,
                "--checkpoint",
                f"artifacts/models/{'spelling' if words[0] == 'spelling' else 'half_hour'}.best.pt",
            ]
    if any("uniform" in word for word in words) and script == "inference.py":  # has none to choose
        short = short[: short.index("--sampler")]
    if script == "scripts/lab/pictures.py":
        short = ["--checkpoint", "artifacts/models/half_hour.best.pt"]
        monkeypatch.setattr(
            policies,
            "SAMPLERS",
            {
                name: policies.SAMPLERS[name]
                for name in ("ancestral", "confidence", "entropy_bounded", "remask", "remdm_cap")
            },
        )
    monkeypatch.setattr(metrics, "SEARCHED", 5000)
    if script == "scripts/playground.py":
        import gradio

        monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: None)
    # what is pushed is in the folder that was written
    monkeypatch.setattr(exported, "push", lambda folder, name, files: name)
    monkeypatch.setattr(exported, "fetch", lambda name, files=None: posixpath.basename(name))
    monkeypatch.setitem(FAMILIES, "squared", example("Squared"))
    code, _, err = run(MAIN[script], [*words, *short], monkeypatch, capsys)
    return code, err


def test_comparisons_that_are_there_train_nothing(tmp_path, monkeypatch, capsys):
    """The commands of the tables find all runs done, and write the same tables again."""
    shutil.copytree(os.path.join(ROOT, "artifacts/ablations"), tmp_path, dirs_exist_ok=True)
    tables = lambda: {
        path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.md")
    }
    before = tables()
    monkeypatch.setattr(train, "train", lambda cfg, quiet: pytest.fail(f"trains {cfg}"))
    # as those runs had
    monkeypatch.setattr(runtime, "choose_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(
        runtime,
        "choose_dtype",
        lambda name, device: torch.float32 if name == "float32" else torch.bfloat16,
    )
    found = [
        command
        for command in map(shlex.split, commands())
        if command[1] == "scripts/lab/ablate.py" and command[2] in variants.TRAINED
    ]
    for words in found:
        comparison = ablate.COMPARISONS[words[2]]._replace(plot=lambda *_: None)
        monkeypatch.setitem(ablate.COMPARISONS, words[2], comparison)
        words = [
            word.replace("artifacts/ablations", str(tmp_path))
            for word in ["--out_dir", "artifacts/ablations", *words[2:]]
        ]
        code, out, err = run(ablate.main, [*words, "--compile", "on"], monkeypatch, capsys)
        assert code == 0 and "to measure" not in out, (words, out, err)
    assert len(found) > 15 and tables() == before


@pytest.mark.parametrize("name", ("samplers", "temperature", "spelling", "order"))
def test_tables_of_samplers_are_those_of_their_rows(name, tmp_path):
    """The .md of a comparison that trains nothing is written from the .csv beside it."""
    rows = ablate.read_table(os.path.join(ROOT, f"artifacts/ablations/{name}.csv"))
    ablate.write_tables(rows, ablate.COMPARISONS[name].summary(rows), str(tmp_path / name))
    with open(os.path.join(ROOT, f"artifacts/ablations/{name}.md"), encoding="utf-8") as file:
        assert file.read() == (tmp_path / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TEXT)
def test_links_lead_somewhere(name):
    """Pictures, tables and files that the text points to are part of the repository."""
    links = re.findall(r"(?:\]\(|src=\"|srcset=\")(?!http|#)([^)#\s\"]+)", TEXT[name])
    links = [os.path.normpath(os.path.join(os.path.dirname(name), link)) for link in links]
    missing = [link for link in links if not os.path.exists(os.path.join(ROOT, link))]
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", *links], cwd=ROOT, capture_output=True, text=True
    )
    assert not missing and not ignored.stdout


def test_every_picture_is_on_a_page():
    shown = {
        posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
        for name, text in TEXT.items()
        for link in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)\s\"]+\.(?:png|gif))", text)
    }
    assert shown == set(tracked("artifacts/*.png", "artifacts/*.gif"))


@pytest.mark.parametrize("name", TEXT)
def test_links_into_pages_hit_a_heading(name):
    """As GitHub makes anchors: small letters, hyphens for spaces, no punctuation."""
    for page, anchor in re.findall(r"\]\(((?!http)[^)#\s]*)#([^)\s]+)\)", TEXT[name]):
        page = posixpath.normpath(posixpath.join(posixpath.dirname(name), page)) if page else name
        headings = re.findall(r"^#+ (.+)$", TEXT[page], re.M)
        slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
        assert anchor in slugs, (page, anchor)


def test_the_python_of_the_front_page_runs(monkeypatch, capsys):
    [block] = re.findall(r"^```python\n(.*?)^```$", TEXT["README.md"], re.M | re.S)
    monkeypatch.chdir(ROOT)
    exec(block, {})
    *states, bound = capsys.readouterr().out.splitlines()
    assert "░" in "".join(states) and bound.startswith("TextBound(nats=") and len(states) > 10


def test_the_course_runs_as_it_stands(monkeypatch):
    """All examples of learning.md, in one go, and the entries that they add to the dictionaries are
    gone afterwards."""
    monkeypatch.chdir(ROOT)
    before = [(table, dict(table)) for table in (diffusion.SCHEDULES, policies.SAMPLERS, FAMILIES)]
    try:
        course = doctest.DocTestParser().get_doctest(
            TEXT["learning.md"], {"__name__": "__main__"}, "learning.md", "learning.md", 0
        )
        # the functions of its examples are called below
        found = doctest.DocTestRunner().run(course, clear_globs=False)
        assert found.attempted > 40 and not found.failed
        assert {"poly3", "leftmost", "squared"} <= {name for table, _ in before for name in table}
        # what the loops over the dictionaries would run
        test_maths.test_the_bound_does_not_depend_on_the_schedule("poly3")
        test_maths.test_training_loss_is_an_unbiased_bound("poly3", "bernoulli", False)
        for steps in (1, 2, 3, 4, 9):
            test_maths.test_sampler_invariants("leftmost", steps)
        # with one mask there is nothing to add up
        one = diffusion.Corruption(torch.eye(4, dtype=torch.bool), torch.ones(4))
        plain, squared = (
            toy.family(objective=name).loss(toy.Lookup(), toy.SEQUENCES[:4], one)
            for name in ("masked", "squared")
        )
        assert torch.allclose(squared * 4, (plain * 4) ** 2)
    finally:
        for table, old in before:
            table.clear()
            table.update(old)


def test_the_example_of_the_claims_runs():
    name = "artifacts/claims.md"
    example = doctest.DocTestParser().get_doctest(TEXT[name], {}, name, name, 0)
    found = doctest.DocTestRunner().run(example)
    assert found.attempted == 3 and not found.failed


def test_quoted_code_is_the_code():
    """Code in learning.md that names its file stands there like that."""
    quotes = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", TEXT["learning.md"], re.S)
    assert len(quotes) >= 2
    for file, code in quotes:
        assert code in open(os.path.join(ROOT, file), encoding="utf-8").read(), file


def parts(text):
    """(links to result files, text) of each paragraph, item of a list or row of a table. A row also
    has the links of the table's head; a list those of the paragraph before it, if that ends with a
    colon."""
    before = []
    # figures and tables that report.py writes are another test's
    text = report.FIGURE.sub("", report.TABLE.sub("", text))
    text = re.sub(r"\]\((?=ablations/|benchmarks/)", "](artifacts/", text)  # of a page in artifacts
    for paragraph in re.split(r"\n\s*\n", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)):
        head = before if paragraph.startswith(("* ", "- ")) else []
        for number, part in enumerate(re.split(r"\n(?=\||\* |- )", paragraph)):
            own = re.findall(r"\]\((artifacts/[^)]+\.(?:md|csv|jsonl?))\)", part)
            head = own if part.startswith("|") and not number else head
            yield own + head if part.startswith("|") and number else own or head, part
        before = own if paragraph.endswith(":") else []


def numbers(part):
    """(number, unit) of all percentages and numbers with a decimal point or a thousands separator,
    but in code, links and quotation marks."""
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)|\"[^\"]*\"|arXiv:\S+|<[^>]*>", " ", part)
    return re.findall(
        r"(?<![\w.,])x?(\d+(?:,\d{3})*\.\d+|\d{1,3}(?:,\d{3})+|\d+(?=%))(?![.,]?\d)(%| TFLOP/s|)",
        plain,
    )


def known(part, links):
    """Numbers of the result files that may stand in the part: where the first cell of a row is that
    of rows in a file too, up to a colon, theirs alone."""
    first = lambda cell: re.split(r"[:,|]", cell)[0].strip()
    label = first(re.sub(r"`|\(.*?\)|\*\*", "", part.split("|")[1])) if part.startswith("|") else ""
    found = []
    for link in links:
        lines = open(os.path.join(ROOT, link), encoding="utf-8").readlines()
        found += [line for line in lines if label and first(line.lstrip("| ")) == label] or lines
    return [
        abs(float(x))
        for x in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.])", " ".join(found))
    ]


def stands(number, unit, values):
    """Whether one of `values`, in the unit of the text, is rounded to the number (str)."""
    value = float(number.replace(",", ""))
    error = 0.5001 * 10.0 ** -len((number.split(".") + [""])[1])
    # ms of seconds
    scales = {"%": (1, 100), " TFLOP/s": (1e-12,)}.get(unit, (1,) if "." in number else (1, 1000))
    return any(abs(x * scale - value) <= error for x in values for scale in scales)


# Numbers that no result file has: shapes and settings, the sources' and papers' claims, arithmetic
# of the lines beside them, toys that test_maths.py computes, and what the shell's `time` said. In
# parts that link results only large ones, of steps say.
STATED = {
    "README.md": """
    886,272 902,656
    4,194,304 11,403,264 12,228,480 10,963,200 6,446,080 135,266,304 268,435,456 84,977,664
    85,330,944 10,667,520 10,706,304 1,180,800 787,328 3,541,248 889,600 1,024 1,700 3.11
    """,
    "learning.md": """
    10.7 0.9 0.4 15 19 45 63 0.37 5,000 1,024 10,000 5.2 10.5 1.51 7.9 2,200 3.5
    0.008 0.01 0.999 0.9999999 0.2 0.8 0.3 0.1 0.6 1.8 0.693 4.17 2.6 28,200,960
    """,
    "artifacts/README.md": """
    2,000 6,394 5,311,725 1.2 1,501 0.98 0.003 0.006 10.9 1,500 8,500 12,500 33,278
    4,096 7.3 0.64 3.15 28,200,960
    """,
    "artifacts/claims.md": """
    10.7 12.2 0.9 6.50 12,228,480 6,446,080 5,000 1,024 17,400 0.1 89,000 150,000 2.59 2.63 2.73
    2.52
    """,
}


@pytest.mark.parametrize(
    "row", re.findall(r"^\| (`\w+`.*?) \|.*?\| ([\d,; ]{7,}) \|", TEXT["README.md"], re.M)
)
def test_parameter_counts(row):
    """The table of presets, with the vocabularies of its corpora."""
    for name, count in zip(re.findall(r"`(\w+)`", row[0]), row[1].split("; ")):
        cfg = config.Config(**config.PRESETS[name])
        # of the grammar, of the 65 and 27 characters, of BPE
        vocab_size = (
            corpus.load(cfg).tokenizer.vocab_size
            if cfg.data in ("tales", "tales_asked")
            else BUILT_IN[cfg.data].side + 3  # a line break, an end, MASK
            if cfg.data in BUILT_IN
            else 66
            if "shakespeare" in cfg.data
            else 28
            if (name == "text8")
            else cfg.vocab_size
        )
        with torch.device("meta"):
            assert Transformer(cfg, vocab_size).num_parameters() == int(count.replace(",", ""))


@pytest.mark.parametrize("name", TEXT)
def test_figures_are_those_of_the_result_files(name):
    """Every number stands in the result files that its part of the text links to, rounded, or as a
    share if it is a percentage; in a part without links it is in STATED, or of a paper or a test
    that is named beside it."""
    checked, wrong, stated = 0, [], set(STATED[name].split())
    for links, part in parts(TEXT[name]):
        values, sourced = known(part, links), not links and ("arXiv:" in part or "`pytest" in part)
        for number, unit in numbers(part):
            if not (
                sourced
                or number in stated
                and (not links or "," in number)
                or stands(number, unit, values)
            ):
                wrong.append((number + unit, part[:100], links))
            checked += bool(links)
    checked += len(report.FIGURE.findall(TEXT[name])) + len(report.TABLE.findall(TEXT[name]))
    assert checked > 8 and not wrong, "\n".join(map(str, wrong))


def test_the_pages_are_what_report_writes(monkeypatch, tmp_path, capsys, request):
    """And a figure that was changed by hand, or a result file that changed, is found."""
    assert report.differing() == {}
    shutil.copytree(os.path.join(ROOT, "artifacts"), tmp_path / "artifacts")
    for page in report.PAGES:
        shutil.copy(os.path.join(ROOT, page), tmp_path / page)
    for module in (report, results):
        monkeypatch.setattr(module, "ROOT", str(tmp_path))
    request.addfinalizer(results.load.cache_clear)
    results.load.cache_clear()
    page = tmp_path / "README.md"
    text = page.read_text()
    page.write_text(text.replace("[1.997](", "[1.887]("))
    code, _, err = run(report.main, "--check", monkeypatch, capsys)
    assert code == 2 and "README.md and the result files differ" in err
    assert run(report.main, "", monkeypatch, capsys)[0] == 0 and page.read_text() == text
    table = tmp_path / "artifacts/ablations/families.csv"
    table.write_text(table.read_text().replace("1.997", "1.887"))
    results.load.cache_clear()
    assert {"README.md", "artifacts/README.md"} <= report.differing().keys()
    for wrong, message in (
        ("[1.997](a.csv) <!-- masked / bound .3f -->", "marks neither a figure nor a table"),
        ("[1](ablations/families.csv)<!-- masked / bond .3f -->", "no such number"),
        ("[1](benchmarks/shakespeare.json)<!-- levels / 99 / loss .1f -->", "no such number"),
        ("[1](ablations/families.csv)<!-- maskd / bound .3f -->", "has no row with maskd"),
    ):
        (tmp_path / "artifacts/claims.md").write_text(wrong)
        code, _, err = run(report.main, "--check", monkeypatch, capsys)
        assert code == 2 and message in err and len(err.splitlines()) == 1, err


def test_every_result_file_says_where_it_comes_from():
    """artifacts/sources.csv has all files, and no others."""
    files = tracked(*(f"artifacts/*.{end}" for end in ("csv", "json", "jsonl", "txt")))
    listed = [row["file"] for row in results.load("sources.csv")]
    assert sorted(listed) == sorted(
        file.removeprefix("artifacts/") for file in files if not file.endswith("sources.csv")
    )


def test_the_check_of_figures_can_fail():
    """A figure of another row, or of no row."""
    link = "artifacts/ablations/families.md"
    masked = known("| masked | 1.522 |", [link])
    assert (
        numbers("| masked | 1.522 |") == [("1.522", "")]
        and not stands("1.522", "", masked)
        and stands("1.997", "", masked)
    )
    assert stands("1.522", "", known("one 1.522", [link])) and not stands(
        "1.2345", "", known("one 1.2345", [link])
    )
    assert (
        stands("12.5", "%", [0.1249])
        and not stands("12.5", "", [0.1249])
        and stands("1,518", "", [1.51763])
    )
    table = "artifacts/ablations/samplers.csv"
    assert known("| `factor:f` | 90.5% (0.3) |", [table]) != known(
        "| `threshold:p` | 96.0% |", [table]
    )
    assert [
        links
        for links, _ in parts(
            "See [it](artifacts/a.csv):\n\n* one 1.5\n* [two](artifacts/b.md) 2.5\n\nNo 3.5"
        )
    ] == [["artifacts/a.csv"], ["artifacts/a.csv"], ["artifacts/b.md"], []]


# --- tools of the trade ---------------------------------------------------------------------------


def test_nothing_that_users_run_imports_the_laboratory():
    """But report.py, which fills these pages from its results."""
    house = [file for file in tracked("*.py") if not file.startswith(("scripts/lab/", "tests/"))]
    reaching = [
        file
        for file in house
        if re.search(r"^\s*(from|import) scripts\.lab", open(os.path.join(ROOT, file)).read(), re.M)
    ]
    assert len(house) > 40 and reaching == ["scripts/report.py"]


def test_pyproject_and_requirements_name_the_same_packages():
    """The one with the numbers that were tested as lower bounds, the other with them alone."""
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    for name, wanted in (
        ("requirements.txt", project["dependencies"]),
        ("requirements-dev.txt", ["-r requirements.txt", *extras["dev"]]),
    ):
        with open(os.path.join(ROOT, name), encoding="utf-8") as file:
            assert [line.replace(">=", "==") for line in wanted] == file.read().splitlines()


def test_the_workflow_runs_the_tests_on_three_systems():
    with open(os.path.join(ROOT, ".github/workflows/test.yml"), encoding="utf-8") as file:
        job = yaml.safe_load(file)["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash scripts/test.sh"]
    assert len(job["strategy"]["matrix"]["os"]) == 3
