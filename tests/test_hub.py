"""A checkpoint is a file, a folder or a name on the hub, wherever one is given."""

import contextlib
import glob
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, load, run
from hub import TOKEN, serve

import inference
import train
from scripts import evaluate, export
from utils import checkpoint, cli, exported

FOLDER = "artifacts/export/tales.best"


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """Path of the best checkpoint of a tiny run on tales."""
    folder = tmp_path_factory.mktemp("tales")
    train.train(load(["tales", *TINY, "--out_dir", str(folder)])[0], quiet=True)
    return str(folder / "models" / "tales.best.pt")


@pytest.fixture(scope="module")
def ar_folder(tmp_path_factory):
    """An exported autoregressive model."""
    folder = tmp_path_factory.mktemp("ar")
    more = ["--objective", "ar", "--block_len", "0", "--out_dir", str(folder)]
    train.train(load(["tales", *TINY, *more])[0], quiet=True)
    state = checkpoint.read(str(folder / "models" / "tales.best.pt"))
    exported.write(state, str(folder / "judge"), state["model"]["embedding.weight"].dtype)
    return str(folder / "judge")


def commands_beside(hub, commands, tmp_path):
    """[(exit code, stdout, stderr)] of command lines of scripts (list of str), one after the other,
    in a process whose hub is at hub.address (None: nowhere) and whose cache is in tmp_path."""
    driver = (
        f"import json, sys; sys.path[:0] = [{ROOT!r}, {ROOT + '/tests'!r}]; import test_hub\n"
        "print(json.dumps([test_hub.script(c) for c in json.loads(sys.argv[1])]))"
    )
    env = os.environ | {
        "HF_ENDPOINT": hub.address if hub else "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "-c", driver, json.dumps(commands)]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def script(command):
    """(exit code, stdout, stderr) of a script's command line."""
    name, *words = command.split()
    out, err = io.StringIO(), io.StringIO()
    scripts = {"inference": inference, "evaluate": evaluate, "export": export, "train": train}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [name, *words])
            try:
                cli.run(scripts[name].main)
                code = 0
            except SystemExit as end:
                code = end.code
    return code, out.getvalue(), err.getvalue()


def test_the_same_text_by_file_folder_and_name(best, tmp_path):
    """Pushed to the hub and fetched from there, the same seed gives the same text; the commit can
    be named; what is cached needs no hub."""
    write = "inference --seed 3 --device cpu --steps 8 --checkpoint "
    with serve() as hub:
        pushed, *written = commands_beside(
            hub,
            [
                f"export --checkpoint {best} --push me/tales",
                *(write + name for name in (best, FOLDER, "hf:me/tales")),
            ],
            tmp_path,
        )
        commits = hub.repositories["me/tales"]
        commit, files = hub.revision("me/tales", "main")
        hub.commit("me/tales", {"README.md": b"something else"})
        named, gone = commands_beside(
            hub, [f"{write} hf:me/tales@{commit}", f"{write} hf:me/tales"], tmp_path
        )
    cached, away = commands_beside(
        None, [f"{write} hf:me/tales@{commit}", f"{write} hf:me/more"], tmp_path
    )
    assert pushed[0] == 0 and "--checkpoint hf:me/tales" in pushed[1], pushed
    assert len(commits) == 3 and sorted(files) == sorted(
        [*exported.FILES, "README.md", "trace.gif"]
    )
    texts = {(code, out) for code, out, _ in [*written, named, cached]}
    assert len(texts) == 1 and texts.pop()[0] == 0, [written, named, cached]
    assert gone[0] == 2 and "hf:me/tales is no exported checkpoint" in gone[2], gone
    assert away[0] == 2 and "cannot fetch hf:me/more" in away[2] and away[2].count("\n") == 1, away
    card = files["README.md"].decode()
    about = json.load(open(os.path.dirname(best) + "/../logs/tales.json"))
    for part in (
        "hf:me/tales",
        "trace.gif",
        "tales",
        f"{about['parameters']:,}",
        f"{about['bound_nats_per_token']:.4f}",
    ):
        assert part in card, card
    assert files["trace.gif"].startswith(b"GIF89a")


def test_all_scripts_take_all_three(best, ar_folder, monkeypatch, capsys):
    """evaluate, --against, --judge and --init_from take a folder, and a name of the hub (whose
    files are those of a folder here)."""
    state = checkpoint.read(best)
    exported.write(state, "mine", state["model"]["embedding.weight"].dtype)
    folders = {"hf:me/tales": "mine", "hf:me/judge": ar_folder}
    monkeypatch.setattr(exported, "fetch", lambda name, files=None: folders[name])
    reports = []
    for name, judge in (("mine", ar_folder), ("hf:me/tales", "hf:me/judge")):
        words = f"--checkpoint {name} --judge {judge} --rows 4 --num_samples 2 --json r.json"
        code, _, err = run(evaluate.main, words + " --device cpu", monkeypatch, capsys)
        assert code == 0, err
        reports.append(json.load(open("r.json")))
    judged = [r["samples"].pop("judge_perplexity") for r in reports]
    assert judged[0] == judged[1] > 1
    assert reports[0]["bound_nats_per_token"] == reports[1]["bound_nats_per_token"]
    words = f"--checkpoint {best} --against hf:me/tales --rows 4 --device cpu"
    code, out, err = run(evaluate.main, words, monkeypatch, capsys)
    assert code == 0 and "0.0000" in out, err
    for name in ("mine", "hf:me/tales"):
        words = ["tales", *TINY, "--max_iters", "1", "--init_from", name, "--name", "tuned"]
        assert run(train.main, words, monkeypatch, capsys)[0] == 0
    weights = [checkpoint.read(f"artifacts/models/{n}.pt")["model"] for n in ("tuned", "tuned-2")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    code, _, err = run(train.main, "--resume mine", monkeypatch, capsys)
    assert code == 2 and "cannot be resumed" in err and "--init_from mine" in err


def test_the_card_has_the_figures_of_its_checkpoint(best, tmp_path):
    """And none of another step's."""
    state = checkpoint.read(best)
    assert export.report_of(best, state["step"])["best_step"] == state["step"]
    assert export.report_of(best, state["step"] + 1) is None
    assert export.report_of("tales", state["step"]) is None


def test_mistakes_with_the_hub(best, tmp_path):
    """One line each, and nothing lost."""
    write = "inference --device cpu --checkpoint "
    with serve() as hub:
        hub.commit("me/gpt2", {"config.json": b'{"model_type": "gpt2"}'})
        results = commands_beside(
            hub,
            [
                write + "hf:me/none",
                write + "hf:none",
                write + "hf:me/tales@a:b",
                f"export --checkpoint {best} --push tales",
                f"export --checkpoint {best} --push you/tales",
                f"export --checkpoint {best} --push me/gpt2",
                f"export --checkpoint {best} --push me/tales@v2",
            ],
            tmp_path,
        )
        assert hub.revision("me/gpt2", "main")[1] == {"config.json": b'{"model_type": "gpt2"}'}
    messages = [
        "cannot fetch hf:me/none",
        "expected hf:USER/NAME",
        "expected hf:USER/NAME",
        "expected hf:USER/NAME",
        f"all is in {FOLDER}",
        "the model of another program",
        "without a revision",
    ]
    for (code, out, err), message in zip(results, messages, strict=True):
        *before, last = err.splitlines()
        assert code == 2 and last.startswith("error: ") and message in last, (message, err)
        assert all(line.startswith(("wrote", "Fetching")) for line in before if line), err


def test_export_leaves_other_folders_alone(best, monkeypatch, capsys):
    os.mkdir("mine")
    open("mine/config.json", "w").write('{"model_type": "gpt2"}')
    open("mine/model.safetensors", "w").write("mine")
    words = f"--checkpoint {best} --output mine"
    code, _, err = run(export.main, words, monkeypatch, capsys)
    assert code == 2 and "holds something else" in err
    assert open("mine/model.safetensors").read() == "mine"


def test_weights_that_ship_write_until_there_is_a_run(best, monkeypatch, capsys):
    """Without a run inference.py and evaluate.py take them, and say so; then the run's."""
    code, _, err = run(inference.main, "--prompt One", monkeypatch, capsys)
    assert code == 2 and "there is no checkpoint in artifacts/models" in err
    words = f"--checkpoint {best} --output {checkpoint.SHIPPED}"
    assert run(export.main, words, monkeypatch, capsys)[0] == 0
    for script, words in ((inference, "--prompt One"), (evaluate, "--rows 4 --num_samples 0")):
        code, out, err = run(script.main, f"{words} --device cpu", monkeypatch, capsys)
        assert code == 0 and out and f"Until then: {checkpoint.SHIPPED}" in err, err
    code, _, err = run(export.main, "", monkeypatch, capsys)
    assert code == 2 and "there is no checkpoint" in err, "only a run is exported"
    os.mkdir("artifacts/models")
    os.symlink(best, "artifacts/models/mine.best.pt")
    code, out, err = run(inference.main, "--prompt One --device cpu", monkeypatch, capsys)
    assert code == 0 and out and "mine.best on cpu" in err and "Until then" not in err


SHIPPED = sorted(glob.glob(os.path.join(ROOT, "artifacts/pretrained/*")))


def test_there_are_weights_that_ship():
    assert ["stories_small", "tales"] == list(map(os.path.basename, SHIPPED))
    [stories, _] = SHIPPED
    assert inference.load(stories, device="cpu").settings().top_p < 0.98, "no default"


@pytest.mark.parametrize("folder", SHIPPED)
def test_weights_that_ship_write(folder, monkeypatch, capsys):
    """Small enough to be fetched with the repository; they write, as their config wants it."""
    assert sum(os.path.getsize(os.path.join(folder, name)) for name in exported.FILES) < 12e6
    words = ["--checkpoint", folder, "--prompt", "Once upon a time", "--gen-len", "16"]
    code, out, err = run(inference.main, [*words, "--device", "cpu"], monkeypatch, capsys)
    assert code == 0 and out.startswith("Once upon a time") and len(out.split()) > 8, err
