"""What users type, in process: train, resume, prompt, video, and every mistake that gets one line
and exit code 2."""

import dataclasses
import json
import math
import os
import shutil
import signal

import pytest
import torch
from conftest import TINY, break_loss, interrupt, load, run
from toy import MASKED

import config
import diffusion
import inference
import train
from config import Config, SampleConfig
from model import Transformer
from scripts import data as data_script
from scripts import evaluate, export, train_tokenizer
from scripts.lab import ablate, bench, bench_training, compare_samplers, compare_training, variants
from utils import (
    checkpoint,
    cli,
    corpus,
    families,
    metrics,
    optim,
    plots,
    policies,
    runtime,
    samples,
    tales,
    texts,
    tokenizer,
    trace,
    video,
)
from utils.cli import UserError
from utils.families import FAMILIES, family_of
from utils.settings import family_defaults, preset


@pytest.fixture(scope="module")
def tales_run(tmp_path_factory):
    """A finished tiny run on tales; tests only read it."""
    folder = tmp_path_factory.mktemp("tales")
    train.train(
        dataclasses.replace(
            load(["tales", *TINY, "--final_samples", "2", "--out_dir", str(folder)])[0]
        ),
        quiet=True,
    )
    return folder


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Path of the best checkpoint of a tiny run on tales in windows of 16 tokens, for comparisons
    of many samplers."""
    folder = tmp_path_factory.mktemp("short")
    train.train(
        load(["tales", *TINY, "--rows", "stream", "--seq_len", "16", "--out_dir", str(folder)])[0],
        quiet=True,
    )
    return str(folder / "models" / "tales.best.pt")


# --- config ---------------------------------------------------------------------------------------


def test_flags_and_presets():
    cfg, _ = load("shakespeare --n-layer 3 --lr=1e-3 --tie_embeddings --max_minutes 2".split())
    assert (cfg.n_layer, cfg.lr, cfg.tie_embeddings, cfg.tokenizer, cfg.name) == (
        3,
        1e-3,
        True,
        "char",
        "shakespeare",
    )
    assert cfg.max_iters == 0 and cfg.max_minutes == 2, (
        "a time replaces the preset's number of steps"
    )
    assert load("tales --max_minutes 2 --max_iters 7".split())[0].max_iters == 7
    assert load(["tales", "--tie_embeddings", "false"])[0].tie_embeddings is False
    for name in config.PRESETS:
        assert load([name])[0].name == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.n_layer = 4


def test_older_names_of_settings(tales_run):
    """block_size is seq_len, on the command line, in an experiment and in a checkpoint."""
    assert (
        load(["tales", "--block-size", "12"])[0].seq_len
        == load(["tales", "--seq_len=12"])[0].seq_len
        == 12
    )
    open("mine.py", "w").write("config = {'preset': 'tales', 'block_size': 33}")
    assert load(["mine.py"])[0].seq_len == 33
    state = checkpoint.read(str(tales_run / "models" / "tales.best.pt"))
    state["config"]["block_size"] = state["config"].pop("seq_len")
    assert checkpoint.restore(state, torch.device("cpu"))[2].seq_len == 67


def test_the_default_preset_is_stories_once_they_are_prepared(monkeypatch):
    cfg, why = load([])
    assert cfg.name == "tales" and "no data/stories.txt" in why
    os.makedirs("data")
    open("data/stories.txt", "w").write("x")
    cfg, why = load(["--device", "cpu"])
    assert cfg.name == "stories_small" and why.endswith("has been prepared, for a cpu")
    os.makedirs("artifacts/tokenizer")
    path = "artifacts/tokenizer/tokenizer.json"
    open(path, "w").write(tokenizer.train_bpe(["a cat"], 300).to_json())
    cfg, why = load(["--device", "cpu"])
    assert cfg.tokenizer == path and why.endswith(f"; with {path}, of 258 tokens")
    monkeypatch.setattr(runtime, "choose_device", lambda name: torch.device("cuda"))
    cfg, why = load([])
    assert cfg.name == "stories" and "for a cuda" in why


def test_own_text_gets_what_suits_its_length_and_the_machine(monkeypatch, capsys):
    """An essay, a novel, what is longer; and what the user names comes first."""
    small, found = config.PRESETS["stories_small"], {}
    for name, size in (("essay", 20_000), ("novel", 500_000), ("library", 5_000_000)):
        open(f"{name}.txt", "w").write("To be, or not to be: that is it.\n" * (size // 33))
        cfg, why = load(["--data", f"{name}.txt", "--device", "cpu"])
        assert cfg.name == name and cfg.max_minutes == 30 and "on a cpu" in why
        assert f"30 minutes or {cfg.max_iters:,} steps; more with --max_minutes 120 --max_it" in why
        found[name] = cfg
    essay, novel, library = found.values()
    assert (library.n_embd, library.vocab_size) == (small["n_embd"], small["vocab_size"])
    assert essay.tokenizer == "char" and "characters" in load(["--data", "essay.txt"])[1]
    assert essay.n_embd < library.n_embd and novel.vocab_size < library.vocab_size
    assert 0 < essay.max_iters < novel.max_iters < library.max_iters
    assert essay.eval_interval < novel.eval_interval <= library.eval_interval
    cfg, why = load(["--data", "essay.txt", "--max_minutes", "120"])
    assert (cfg.max_minutes, cfg.max_iters) == (120, essay.max_iters) and "120 minutes or" in why
    texts.write_documents("essays.txt", (f"{n} " + 99 * "To be, or not. " for n in range(100)))
    whole, _ = load(["--data", "essays.txt"])
    assert load(["--data", "essays.txt", "--max_documents", "9"])[0].max_iters < whole.max_iters / 5
    cfg, why = load(["--data", "library.txt", "--max_iters", "5", "--n_layer", "1"])
    assert (cfg.max_minutes, cfg.max_iters, cfg.n_layer) == (0, 5, 1) and "at most 5 steps" in why
    assert load(["--data", "essay.txt", "--max_minutes", "0"])[0].max_iters == essay.max_iters
    cfg, why = load(["--data", "essay.txt", "--tokenizer", "bpe"])
    assert cfg.vocab_size < novel.vocab_size and f"BPE of {cfg.vocab_size}" in why
    cfg, _ = load(["--data", "essay.txt", "--vocab_size", "300"])
    assert (cfg.tokenizer, cfg.vocab_size) == ("bpe", 300)
    for words in ("--rows document", "--corruption bernoulli", "--complementary true"):
        cfg, why = load(["--data", "library.txt", *words.split()])
        assert cfg.block_len == 0 and "blocks" not in why, words  # which cannot have that
    assert load(["--data", "library.txt", "--dropout", "0.1"])[0].block_len == 4
    for words in ("--rows document", "--corruption bernoulli"):
        code, _, err = run(train.main, f"stories_small {words}", monkeypatch, capsys)
        assert code == 2 and "block_len" in err and err.count("\n") == 1, err
    monkeypatch.setattr(runtime, "choose_device", lambda name: torch.device("cuda"))
    cfg, why = load(["--data", "library.txt"])
    assert (cfg.n_embd, cfg.batch_size) == (384, 64) and "on a cuda" in why


def test_tuning_on_own_text_takes_the_checkpoints_shape(tales_run, monkeypatch, capsys):
    texts.write_documents("my.txt", (f"The cat saw {n} mice, and was glad." for n in range(400)))
    path = str(tales_run / "models" / "tales.best.pt")
    cfg, why = load(["--data", "my.txt", "--init_from", path])
    theirs = checkpoint.read(path)["config"]
    assert (cfg.n_embd, cfg.seq_len) == (theirs["n_embd"], theirs["seq_len"]) and "BPE" not in why
    assert (cfg.rows, cfg.loss_weighting) == (theirs["rows"], theirs["loss_weighting"])
    assert 0 < cfg.max_iters < 1000  # so many passes over a short text
    state = checkpoint.read(path)  # characters are shorter than tokens, so a pass has more steps
    state["tokenizer"] = tokenizer.train_char(["The cat saw mice, and was glad."], True).to_json()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "read", lambda _: state)
        assert load(["--data", "my.txt", "--init_from", path])[0].max_iters > 3 * cfg.max_iters
    words = ["--data", "my.txt", "--init_from", path, "--max_iters", "1", "--final_samples", "0"]
    code, _, err = run(train.main, [*words, "--compile", "off"], monkeypatch, capsys)
    assert code == 0, err


@pytest.mark.parametrize("characters", (40, 300, 5_000))
def test_any_text_that_holds_a_window_trains(characters, monkeypatch, capsys):
    """However short; the window is such that something can be held out."""
    open("my.txt", "w").write(("To be, or not to be: that is the question.\n" * 200)[:characters])
    words = "--data my.txt --max_iters 1 --n_layer 1 --n_embd 8 --final_samples 0 --compile off"
    words += " --final_rows 4"
    code, _, err = run(train.main, words, monkeypatch, capsys)
    if characters == 40:
        assert code == 2 and "less than one window" in err and err.count("\n") == 1
    else:
        assert code == 0, err


def test_an_experiment_file_is_a_preset():
    open("mine.py", "w").write('config = {"preset": "shakespeare", "n_layer": 2, "dropout": 0.2}')
    cfg, _ = load(["mine.py", "--n_head", "4"])
    assert (cfg.name, cfg.n_layer, cfg.dropout, cfg.n_head, cfg.tokenizer) == (
        "mine",
        2,
        0.2,
        4,
        "char",
    )
    open("typo.py", "w").write('config = {"n_layers": 2}')
    with pytest.raises(UserError, match="did you mean n_layer"):
        load(["typo.py"])


@pytest.mark.parametrize(
    "words, message",
    (
        ("tale", "did you mean tales"),
        ("tales shakespeare", "one preset at a time"),
        ("--n_layrs 3", "did you mean --n_layer"),
        ("--n_layer three", "expected a whole number"),
        ("--lr fast", "expected a number"),
        ("--n_layer", "needs a value"),
        ("--tie_embeddings maybe", "expected true or false"),
        ("--init warm", "not one of normal, zero"),
        ("--n_head 5 --n_embd 384", "n_head=5"),
        ("--diffusion_steps 100", "corruption=count"),
        ("--time_conditioning table", "diffusion_steps=0"),
        ("--batch_size 0", "batch_size=0"),
        ("--dropout 1.5", "dropout=1.5"),
        ("--max_iters 0 --max_minutes 0", "max_minutes=0"),
        ("missing.py", "there is no file missing.py"),
        ("--schedule cosine", "there is no schedule cosine"),
        ("--data none.txt", "there is no file"),
        ("--resume none.pt", "there is no checkpoint"),
        ("--resume auto", "there is no checkpoint"),
        ("--init_from none.pt", "there is no checkpoint"),
        ("--device cuda", "device=cuda"),
        ("--name a/b", "must not be a path"),
        ("--beta1 2", "beta1=2.0"),
        ("--seed 99999999999999999999", "seed="),
        ("--max_minutes nan", "expected a number"),
        ("--rows document --tokenizer char", "corpus of several documents"),
        ("broken.py", "does not run"),
        ("number.py", "does not define"),
        ("text.py", "must be of type int"),
        ("null.py", "must be of type int"),
        ("nan.py", "finite number"),
        ("self.py", "there is no preset self.py"),
        ("--name x.best", "nor end in .best"),
        ("--name=", "no name"),
        ("--tokenizer none.json", "there is no tokenizer"),
        ("--vocab_size 100", "too small"),
        ("--data letter.txt --rows document", "a single character"),
        ("--batch_size 1000000000", "tokens a step"),
        (
            "--tokenizer char --device cpu --batch_size 500000 --seq_len 256",
            "a pass of 500000 rows of 256 tokens (micro_batch=0, batch_size=500000, seq_len=256) "
            "needs at least",
        ),
        ("--tokenizer char --n_layer 1000 --n_embd 65536 --n_head 1", "n_embd=65536"),
        ("--max_iters 9999999999999999", "max_iters=9999999999999999 must be"),
        ("--seq_len 10000000", "must be at most 131,072"),
        ("--final_samples 9999999", "must be at most 100,000"),
        ("--tokenizer holes.json", "its ids are not"),
        ("--tokenizer words.json", "no byte-level BPE"),
    ),
)
def test_mistakes_in_training(words, message, monkeypatch, capsys):
    if message == "device=cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    open("some.txt", "w").write("to be or not to be " * 200)
    open("letter.txt", "w").write("a")
    open("holes.json", "w").write(
        tokenizer.train_char(["abc"], False).to_json().replace('"c":2', '"c":7')
    )
    open("words.json", "w").write(
        tokenizer.train_bpe(["a b"], 300).to_json().replace('"a":', '"▁a":')
    )
    open("broken.py", "w").write("config = {")
    open("number.py", "w").write("config = 3")
    open("text.py", "w").write('config = {"n_layer": "3"}')
    open("null.py", "w").write('config = {"n_layer": None}')
    open("nan.py", "w").write('config = {"lr": float("nan")}')
    open("self.py", "w").write('config = {"preset": "self.py"}')
    base = (
        [] if words.split()[0][0] != "-" or words.startswith("--resume") else ["--data", "some.txt"]
    )
    code, out, err = run(train.main, base + words.split(), monkeypatch, capsys)
    assert code == 2 and message in err, (code, err)
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert not os.path.exists("artifacts/models")


@pytest.mark.parametrize(
    "words, message",
    (
        ("--gen-len 0", "gen_len=0"),
        ("--gen_len -3", "gen_len=-3"),
        ("--gen-len 20 --min-len 30", "min_len=30, but there are only 20 tokens to generate"),
        ("--no-stop --min-len 3", "no_stop=True, min_len=3: one or the other"),
        ("--sampler best", "there is no sampler"),
        ("--sampler confidense", "did you mean confidence"),
        ("--temperature hot", "expected a number"),
        ("--top_p 0", "top_p=0"),
        ("--checkpoint none.pt", "there is no checkpoint"),
        ("--checkpoint bad.pt", "no checkpoint"),
        ("--promt x", "did you mean --prompt"),
        ("--checkpoint letters.pt", "no tokenizer"),
        ("--checkpoint mine.pt", "there is no sampler mine"),
        ("--checkpoint romeo.pt", "no checkpoint"),
        ("--checkpoint half.pt", "no checkpoint"),
        ("--temperature nan", "expected a number"),
        ("--seed -1", "seed=-1"),
        ("--viz-video x.webm", "must end in .mp4"),
        ("--viz-gif x.jpg", "must end in .gif"),
        ("--schedule linaer", "did you mean linear"),
        ("hello", "--prompt"),
        ("--num_samples 0", "num_samples=0"),
        ("--steps 0", "steps=0"),
        ("--gen_len 5 --viz-video blocked/x.mp4", "cannot write"),
        ("--gen_len 5 --viz-gif blocked/x.gif", "cannot write"),
        ("--infill a[99999999999]b", "a hole of 99999999999 tokens"),
        ("--infill a[131072]b", "more than 131,072"),
        ("--gen-len 99999999999", "gen_len=99999999999 must be at most 131,072"),
        ("--num-samples 99999999", "must be at most 100,000"),
        ("--num-samples 100000 --gen-len 1000", "100,000 texts of up to 1,001 tokens"),
        ("--steps 99999999999", "steps=99999999999 must be"),
        ("--gen-len 5000 --viz-gif x.gif", "give --trace-every 2"),
        ("--gen-len 2000 --viz-html x.html", "give --trace-every 2"),
        (
            "--gen-len 5 --sampler remask --steps 131072 --viz-html x.html --trace-every 0",
            "trace_every=0",
        ),
        ("--checkpoint expanded.pt", "no tensor of finite"),
        ("--checkpoint odd.pt", "there is no schedule odd"),
        ("--gif-frame-ms 99999", "must be at most 60,000"),
        ("--checkpoint writes.pt", "no way of sampling called viz_video"),
        ("--checkpoint deep.pt", "it holds 15,552 weights, and the network of its config has"),
        ("--checkpoint nan.pt", "no tensor of finite"),
    ),
)
def test_mistakes_in_inference(words, message, tales_run, monkeypatch, capsys):
    open("bad.pt", "w").write("this is no checkpoint")
    open("romeo.pt", "w").write("Romeo, wherefore art thou?")
    torch.save({"version": config.VERSION, "tokenizer": "x"}, "half.pt")
    state = checkpoint.read(str(tales_run / "models" / "tales.best.pt"))
    torch.save({**state, "tokenizer": "{}"}, "letters.pt")
    torch.save({**state, "sample": {"sampler": "mine"}}, "mine.pt")
    torch.save({**state, "sample": {"viz_video": "x.mp4"}}, "writes.pt")
    torch.save({**state, "config": state["config"] | {"n_layer": 1000, "n_embd": 65536}}, "deep.pt")
    torch.save({**state, "model": {"x": torch.zeros(1).expand(10**6, 10**6)}}, "expanded.pt")
    torch.save({**state, "config": state["config"] | {"schedule": "odd"}}, "odd.pt")
    torch.save(
        {**state, "model": {name: weights * math.nan for name, weights in state["model"].items()}},
        "nan.pt",
    )
    open("blocked", "w").write("a file, not a folder")
    words = words.split()
    if "--checkpoint" not in words:
        words += ["--checkpoint", str(tales_run / "models" / "tales.best.pt")]
    code, out, err = run(inference.main, words, monkeypatch, capsys)
    last = err.strip().splitlines()[-1]
    assert code == 2 and message in last and "Traceback" not in err, (code, err)


def test_a_long_prompt_and_no_checkpoint_at_all(tales_run, monkeypatch, capsys):
    code, _, err = run(inference.main, [], monkeypatch, capsys)
    assert code == 2 and "python train.py" in err
    code, _, err = run(
        inference.main,
        ["--prompt", "word " * 100, "--checkpoint", str(tales_run / "models" / "tales.best.pt")],
        monkeypatch,
        capsys,
    )
    assert code == 2 and "leaves no room" in err


@pytest.mark.parametrize(
    "words, family, most",
    (
        ("", {}, 60),
        ("--steps 10", {}, 10),
        ("--steps 10 --decode-block 10", {}, 16),
        ("--steps 100", {}, 60),
        ("--steps 100 --sampler remdm_cap", {}, 100),
        ("--steps 10 --sampler first_hitting", {}, 60),
        ("--steps 10", {"objective": "ar"}, 60),
        ("--steps 10 --correctors 2 --sampler reverse", {"objective": "uniform"}, 30),
        ("", {"objective": "uniform"}, 64),
    ),
)
def test_how_many_states_a_trace_can_have(words, family, most, tales_run):
    """No more than that come, which is what a trace is refused by."""
    model, text, cfg = checkpoint.restore(
        checkpoint.read(str(tales_run / "models" / "tales.best.pt")), torch.device("cpu")
    )
    cfg = dataclasses.replace(
        cfg, **family_defaults(family.get("objective")) | family | {"seq_len": 64}
    )
    options = cli.merge(SampleConfig, cli.parse(words.split(), SampleConfig)[1])
    row = [text.end] * 4 + [text.mask] * 60
    assert trace.most_states(row, options, family_of(cfg), text.mask) == most
    if not family:
        states = sum(
            bool((step.fresh | step.remasked).any())
            for step in diffusion.sample(
                family_of(cfg), model, torch.tensor([row]), options, window=64
            )
        )
        assert states <= most


def test_help_and_list(monkeypatch, capsys):
    for main, kind in ((train.main, Config), (inference.main, SampleConfig)):
        code, out, _ = run(main, "--help", monkeypatch, capsys)
        assert code == 0 and all(f"--{f.name}" in out for f in dataclasses.fields(kind))
        code, out, _ = run(main, "--list", monkeypatch, capsys)
        assert all(name in out for name in [*config.PRESETS, *policies.SAMPLERS])
    for main in (data_script.main, train_tokenizer.main, evaluate.main):
        code, out, _ = run(main, "--help", monkeypatch, capsys)
        assert code == 0 and "--" in out


# --- training -------------------------------------------------------------------------------------


def weights(path):
    return checkpoint.read(str(path))["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def settings(**changes):
    cfg, _ = load(["tales", *TINY])
    return dataclasses.replace(cfg, **changes)


def test_a_run_writes_what_it_says(tales_run):
    assert sorted(os.listdir(tales_run / "models")) == ["tales.best.pt", "tales.pt"]
    entries = [json.loads(line) for line in open(tales_run / "logs" / "tales.jsonl")]
    assert [entry["step"] for entry in entries] == [3, 6]
    report = json.load(open(tales_run / "logs" / "tales.json"))
    assert (
        report["steps"] == 6
        and report["bound_nats_per_story"] > report["exact_nats_per_story"] > 25
    )
    assert (tales_run / "plots" / "tales.loss.png").stat().st_size > 10_000
    best = checkpoint.read(str(tales_run / "models" / "tales.best.pt"))
    assert "optimizers" not in best and best["nll"] == min(entry["bound"] for entry in entries)


def test_evaluating_more_often_changes_nothing():
    train.train(settings(eval_interval=6, name="a"), quiet=True)
    train.train(settings(eval_interval=1, name="b", dropout=0.0), quiet=True)
    assert same(weights("artifacts/models/a.pt"), weights("artifacts/models/b.pt"))


def test_resume_by_command_line(monkeypatch, capsys):
    run(train.main, ["tales", *TINY], monkeypatch, capsys)
    code, out, err = run(train.main, "--resume auto --max_iters 9 --lr 0.001", monkeypatch, capsys)
    assert code == 0 and "resuming tales at step 6, with max_iters 6 -> 9, lr 0.004 -> 0.001" in out
    assert checkpoint.read("artifacts/models/tales.pt")["step"] == 9
    for words, message in (
        ("--n_layer 2", "cannot change"),
        ("tales", "leave out tales"),
        ("--max_iters 9", "is finished"),
    ):
        code, _, err = run(train.main, ["--resume", "auto", *words.split()], monkeypatch, capsys)
        assert code == 2 and message in err
    code, _, err = run(train.main, "--resume artifacts/models/tales.best.pt", monkeypatch, capsys)
    assert code == 2 and "weights only" in err


def test_ctrl_c_saves_and_says_how_to_go_on(monkeypatch, capsys):
    # ignored where a shell runs the tests in the background
    before = signal.getsignal(signal.SIGINT)
    interrupt(monkeypatch, 2, signal.SIGINT)
    code, out, _ = run(train.main, ["tales", *TINY], monkeypatch, capsys)
    assert (
        code == 0
        and "stopped at step 3; go on with: python train.py --resume artifacts/models/tales.pt"
        in out
    )
    assert checkpoint.read("artifacts/models/tales.pt")["step"] == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_a_checkpoint_is_saved_only_while_all_is_finite(monkeypatch):
    """Also where it is saved more often than evaluated; and not when only the last update broke the
    weights."""
    draw = train.draw_batch
    break_loss(monkeypatch, 3, math.inf)
    with pytest.raises(UserError, match="not finite at step 4"):
        train.train(settings(grad_clip=0.0, save_interval=2, eval_interval=6), quiet=True)
    assert (
        os.listdir("artifacts/models") == ["tales.pt"]
        and checkpoint.read("artifacts/models/tales.pt")["step"] == 2
    )
    monkeypatch.setattr(train, "draw_batch", draw)
    monkeypatch.setattr(optim, "lr_scale", lambda cfg, n, progress: math.inf if n == 1 else 1.0)
    with pytest.raises(UserError, match="weight is not finite at step 2"):
        train.train(
            settings(name="broken", grad_clip=0.0, save_interval=2, eval_interval=6), quiet=True
        )
    assert os.listdir("artifacts/models") == ["tales.pt"]


def test_resume_goes_on_where_the_checkpoint_lies(monkeypatch, capsys):
    """A run of the same name elsewhere is left alone."""
    train.train(settings(), quiet=True)
    os.makedirs("friend/models")
    os.rename("artifacts/models/tales.pt", "friend/models/renamed.pt")
    best = open("artifacts/models/tales.best.pt", "rb").read()
    code, out, err = run(
        train.main, "--resume friend/models/renamed.pt --max_iters 9", monkeypatch, capsys
    )
    assert code == 0, err
    assert sorted(os.listdir("friend/models")) == ["renamed.best.pt", "renamed.pt"]
    assert os.listdir("artifacts/models") == ["tales.best.pt"]
    assert open("artifacts/models/tales.best.pt", "rb").read() == best
    os.rename("friend/models/renamed.pt", "lost.pt")
    code, _, err = run(train.main, "--resume lost.pt --max_iters 12", monkeypatch, capsys)
    assert code == 2 and "not in a folder models/" in err


def test_a_run_that_has_begun_keeps_its_name():
    os.makedirs("artifacts/logs")
    open("artifacts/logs/tales.jsonl", "w").close()
    train.train(settings(), quiet=True)
    assert (
        os.path.exists("artifacts/models/tales-2.pt")
        and os.path.getsize("artifacts/logs/tales.jsonl") == 0
    )


def test_the_checkpoint_says_what_auto_meant():
    train.train(settings(device="auto", dtype="auto", compile="auto"), quiet=True)
    stored = checkpoint.read("artifacts/models/tales.pt")["config"]
    assert "auto" not in (stored["device"], stored["dtype"], stored["compile"])


def test_compiling_that_fails_falls_back_to_eager(monkeypatch, capsys):
    def broken(*_, **__):
        def fail(*_, **__):
            raise RuntimeError("no C++ compiler found")

        module = torch.nn.Identity()
        module.forward = fail
        return module

    monkeypatch.setattr(torch, "compile", broken)
    train.train(settings(compile="on", name="a"), quiet=True)
    assert "no C++ compiler found); going on without it" in capsys.readouterr().out
    train.train(settings(compile="off", name="b"), quiet=True)
    assert same(weights("artifacts/models/a.pt"), weights("artifacts/models/b.pt"))


def test_compiled_training_is_eager_training():
    """The compiler, attention in float32 within bfloat16, and dropout with PyTorch's own random
    numbers."""
    if not shutil.which("g++") and not shutil.which("clang++"):
        pytest.skip("no C++ compiler is installed, which torch.compile needs on a CPU")
    for name, changes in (("on", {}), ("off", {}), ("start", {"lr": 0.0, "muon_lr": 0.0})):
        train.train(
            settings(
                compile="on" if name == "on" else "off",
                name=name,
                dtype="bfloat16",
                dropout=0.1,
                max_iters=3,
                optimizer="adamw",
                warmup_iters=0,
                **changes,
            ),
            quiet=True,
        )
    assert checkpoint.read("artifacts/models/on.pt")["config"]["compile"] == "on", "it did compile"
    on, off, start = (weights(f"artifacts/models/{name}.pt") for name in ("on", "off", "start"))
    for key in start:
        assert (on[key] - off[key]).norm() < 0.3 * (off[key] - start[key]).norm() > 0, key


def test_own_text_in_one_command(monkeypatch, capsys):
    open("my.txt", "w").write("To be, or not to be: that is the question.\n" * 100)
    code, out, err = run(
        train.main,
        ["--data", "my.txt", "--tokenizer", "char", "--seq_len", "32", *TINY],
        monkeypatch,
        capsys,
    )
    assert code == 0 and "your own data" in out, err
    assert os.path.exists("artifacts/models/my.best.pt")
    code, out, _ = run(
        inference.main, ["--prompt", "To be", "--gen-len", "10"], monkeypatch, capsys
    )
    assert code == 0 and out.startswith("To be") and len(out.rstrip("\n")) <= 15


def test_an_existing_run_is_never_overwritten():
    train.train(settings(), quiet=True)
    before = open("artifacts/models/tales.pt", "rb").read()
    train.train(settings(seed=2), quiet=True)
    assert open("artifacts/models/tales.pt", "rb").read() == before
    assert {"tales-2.pt", "tales-2.best.pt"} <= set(os.listdir("artifacts/models"))
    assert checkpoint.newest("artifacts/models").endswith("tales-2.best.pt")


def test_init_from_starts_a_new_run_from_the_weights():
    train.train(settings(), quiet=True)
    train.train(
        settings(
            name="tuned",
            init_from="artifacts/models/tales.best.pt",
            max_iters=1,
            lr=0.0,
            muon_lr=0.0,
        ),
        quiet=True,
    )
    assert same(weights("artifacts/models/tales.best.pt"), weights("artifacts/models/tuned.pt"))
    for change in ({"n_embd": 32}, {"n_head": 1}, {"tie_embeddings": False}):
        with pytest.raises(UserError, match=f"was trained with {next(iter(change))}="):
            train.train(settings(init_from="artifacts/models/tales.best.pt", **change), quiet=True)
    times = dict(time_conditioning="table", corruption="bernoulli", diffusion_steps=10)
    train.train(settings(name="table", **times), quiet=True)
    with pytest.raises(UserError, match="was trained with diffusion_steps=10, not 20"):
        train.train(
            settings(init_from="artifacts/models/table.best.pt", **times | {"diffusion_steps": 20}),
            quiet=True,
        )


def test_a_loss_that_is_not_finite_is_never_saved():
    with pytest.raises(UserError, match="not finite at step 3"):
        train.train(settings(lr=1e30, grad_clip=0.0, muon_lr=1e30), quiet=True)
    assert not os.path.exists("artifacts/models")


def test_max_minutes_ends_a_run():
    report = train.train(settings(max_iters=0, max_minutes=0.03, eval_interval=1000), quiet=True)
    assert report["steps"] > 1 and 0.03 <= report["minutes"] < 1
    report = train.train(settings(max_iters=0, max_minutes=1e-6, eval_interval=1000), quiet=True)
    assert report["steps"] == 1, (
        "time that is over before the first step is no reason to lose the run"
    )


def make_figure(path, content):
    plots.save(plots.pyplot().figure(figsize=(1, content)), path)


WRITERS = {  # file -> function of its path and of a number, which makes contents differ
    "x.pt": lambda path, n: checkpoint.save(path, {"step": n}),
    "x.json": lambda path, n: runtime.write_json(path, {"step": n}),
    "x.jsonl": lambda path, n: (
        runtime.begin_log(path, n)
        if os.path.exists(path)
        else runtime.write_line(path, {"step": n})
    ),
    "x.txt": lambda path, n: texts.write_documents(path, ["a" * n]),
    "tokenizer.json": lambda path, n: tokenizer.save(tokenizer.train_char(["abc"[:n]], 1), path),
    "x.csv": lambda path, n: ablate.write_tables([{"a": n}], [{"a": n}], path.removesuffix(".csv")),
    "x.png": make_figure,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file(name, monkeypatch):
    """Nothing is half written, and nothing is left beside it."""
    WRITERS[name](name, 2)
    before = open(name, "rb").read()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=f"cannot write {name}.*No space left"):
            WRITERS[name](name, 1)
    assert open(name, "rb").read() == before and not [
        file for file in os.listdir() if file.endswith(".tmp")
    ]
    WRITERS[name](name, 1)
    assert open(name, "rb").read() != before


@pytest.mark.skipif(os.name == "nt", reason="needs links and devices")
def test_links_and_devices_stay_what_they_are():
    open("target.json", "w").write("old")
    os.symlink("target.json", "link.json")
    runtime.write_json("link.json", "new")
    assert os.path.islink("link.json") and open("target.json").read() == '"new"'
    os.symlink("/dev/null", "device")
    runtime.write_json("device", "new")
    assert os.path.islink("device") and not os.path.isfile("/dev/null")
    with pytest.raises(UserError, match="cannot write folder"):
        os.mkdir("folder")
        runtime.write_json("folder", "new")


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    whole = dict(version=config.VERSION, config={}, sample={}, step=1, nll=1.0, model={})
    torch.save(whole | {"tokenizer": "a"}, tmp_path / "good.pt")
    assert checkpoint.read(str(tmp_path / "good.pt"))["step"] == 1
    torch.save(whole | {"tokenizer": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.read(str(tmp_path / "evil.pt"))
    assert not os.path.exists(tmp_path / "evil")
    whole = open(tmp_path / "evil.pt", "rb").read()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:cut])
        with pytest.raises(UserError):
            checkpoint.read(str(tmp_path / "cut.pt"))


@pytest.mark.parametrize(
    "extra",
    (
        "",
        "--corruption bernoulli --schedule cos --diffusion_steps 10 --time_conditioning table "
        "--loss_weighting full --init normal --optimizer adamw",
        "--corruption bernoulli --schedule cos2 --loss_weighting pooled --time_conditioning adaln",
        "--loss_weighting clip --schedule md4_cosine --time_conditioning sinusoidal --rows "
        "document",
        "--loss_weighting flat --dropout 0.1 --tie_embeddings --dtype bfloat16",
    ),
)
def test_other_settings_train_and_sample(extra, monkeypatch, capsys):
    texts.write_documents("some.txt", iter(tales.generate(1, 200)))
    code, out, err = run(
        train.main,
        [*"--data some.txt --name x --tokenizer char --seq_len 32".split(), *TINY, *extra.split()],
        monkeypatch,
        capsys,
    )
    assert code == 0, err
    code, out, err = run(
        inference.main,
        ["--gen-len", "8", "--prompt", "One day", "--dtype", "float32"],
        monkeypatch,
        capsys,
    )
    assert code == 0 and out.startswith("One day"), err


SOURCES = {  # what makes a source's preset small; the rest is as documented
    "micro_char": "",
    "micro_bpe": "--tokenizer bpe --vocab_size 400",
    "notes": "",
    "notes_300": "",
    "guide": "--warmup_iters 2",
}


@pytest.mark.parametrize("preset", SOURCES)
def test_the_source_systems_from_data_to_video(preset, monkeypatch, capsys):
    """Their settings, but for the sizes, train and write a text and its video."""
    texts.write_documents("some.txt", iter(tales.generate(1, 200)))
    code, out, err = run(
        train.main,
        [
            preset,
            *TINY,
            *f"--data some.txt --seq_len 32 --final_samples 2 {SOURCES[preset]}".split(),
        ],
        monkeypatch,
        capsys,
    )
    assert code == 0, err
    report = json.load(open(f"artifacts/logs/{preset}.json"))
    assert report["exp_of_masked_ce_schedule_dependent"] == pytest.approx(
        math.exp(report["masked_ce_pooled"])
    )
    code, out, err = run(
        inference.main,
        ["--prompt", "One day", "--gen-len", "12", "--viz-video", "x.mp4"],
        monkeypatch,
        capsys,
    )
    assert code == 0 and out.startswith("One day") and os.path.getsize("x.mp4") > 5000, err


def test_the_source_systems_are_what_their_documents_say():
    cfg = lambda name: load([name])[0]
    assert [
        (cfg(name).diffusion_steps, cfg(name).max_iters) for name in ("notes", "notes_300")
    ] == [(100, 105_000), (300, 300_000)]
    for name, window in (("micro_char", 256), ("micro_bpe", 256), ("notes", 128), ("guide", 128)):
        c = cfg(name)
        assert (c.seq_len, c.batch_size, c.lr, c.optimizer, c.corruption) == (
            window,
            64,
            3e-4,
            "adamw",
            "bernoulli",
        ), name
    count = lambda name, vocab: Transformer(cfg(name), vocab).num_parameters()
    assert (count("micro_char", 66), count("micro_bpe", 2048)) == (10_706_304, 12_228_480)
    assert 6.4e6 < count("guide", 66) < 6.6e6, "not the 12.45M of the document"
    assert 10.8e6 < count("notes", 66) < 11.2e6


FAMILY = {
    "ar": "--objective ar",
    "blocks": "--block_len 8",
    "uniform": "--objective uniform",
    "document": "--block_len 9 --rows document --seq_len 28",
    "blocks told": "--block_len 8 --time_conditioning adaln",
    "importance": "--time_sampling importance",
}


@pytest.mark.parametrize("name", FAMILY)
def test_every_family_trains_writes_and_is_judged(name, monkeypatch, capsys):
    """One command each, with short rows, half precision and pieces of a batch; prompts, long texts,
    viewers, evaluation."""
    texts.write_documents("some.txt", iter(tales.generate(1, 200)))
    code, out, err = run(
        train.main,
        [
            *"--data some.txt --name x --tokenizer char --seq_len 32".split(),
            *TINY,
            *"--short_rows 0.5 --micro_batch 2 --dtype bfloat16 --final_samples 2".split(),
            *FAMILY[name].split(),
        ],
        monkeypatch,
        capsys,
    )
    assert code == 0, err
    words = [
        "--prompt",
        "One day",
        *"--num-samples 2 --json --viz-html x.html --viz-gif x.gif".split(),
    ]
    longer = [] if name == "uniform" else ["--gen-len", "60"]
    code, out, err = run(inference.main, [*words, *longer], monkeypatch, capsys)
    results = [json.loads(line) for line in out.splitlines()]
    assert (
        code == 0 and len(results) == 2 and all(r["text"].startswith("One day") for r in results)
    ), err
    assert results[0]["text"] != results[1]["text"] and results[0]["nfe"] > 0
    if name == "ar":
        assert results[0]["sampler"] == "left to right"
    code, out, err = run(
        evaluate.main,
        "--json r.json --plot levels.png --num_samples 2"
        + " --left_to_right 2" * (name != "uniform"),
        monkeypatch,
        capsys,
    )
    report, final = json.load(open("r.json")), json.load(open("artifacts/logs/x.json"))
    assert code == 0 and report["bound_nats_per_token"] == pytest.approx(
        final["bound_nats_per_token"], rel=1e-5
    ), err
    assert [entry["level"] for entry in report["levels"]] == sorted(
        {entry["level"] for entry in report["levels"]}
    )
    if name == "ar":
        assert report["left_to_right_nats_per_token"] == pytest.approx(
            report["bound_of_the_same_rows"], rel=1e-3
        )
        assert report["bound_se_masks"] == 0 and "exp_of_masked_ce_schedule_dependent" not in report
        state = checkpoint.read("artifacts/models/x.best.pt")
        model, text, cfg = checkpoint.restore(state, torch.device("cpu"))
        rows = corpus.load(cfg, text).held_out[:4]
        logits = model(
            torch.cat((torch.full((4, 1), text.mask), rows[:, :-1]), 1), attention="causal"
        )
        nll = -logits.log_softmax(-1).gather(2, rows[..., None])[:, 1:].mean().item()
        assert report["nats_per_token_but_the_first"] == pytest.approx(nll, rel=0.01), (
            "but for bfloat16"
        )


def test_a_new_objective_is_one_entry(monkeypatch, capsys):
    """As README says: masks of another loss, which then trains, is judged by the bound, writes and
    is evaluated."""

    class Focal(diffusion.Masked):
        def loss(self, model, x0, corruption, token_nll=diffusion.token_nll):
            return super().loss(
                model, x0, corruption, lambda logits, targets: token_nll(logits, targets) ** 2
            )

    monkeypatch.setitem(FAMILIES, "focal", Focal)
    texts.write_documents("some.txt", iter(tales.generate(1, 200)))
    code, out, err = run(
        train.main,
        [
            *"--data some.txt --tokenizer char --seq_len 32".split(),
            *TINY,
            "--objective",
            "focal",
            "--name",
            "x",
        ],
        monkeypatch,
        capsys,
    )
    assert code == 0, err
    log = [json.loads(line) for line in open("artifacts/logs/x.jsonl")]
    assert log[0]["loss"] > 1.5 * log[0]["bound"], "squares"
    assert run(inference.main, ["--prompt", "One day"], monkeypatch, capsys)[0] == 0
    assert run(evaluate.main, ["--num_samples", "2"], monkeypatch, capsys)[0] == 0


@pytest.mark.parametrize(
    "words, message",
    (
        ("--objective gan", "there is no objective gan"),
        ("--block_len 5", "seq_len=32: blocks must fill the window; seq_len=30, say"),
        ("--block_len 8 --rows document", "but for the <|endoftext|>"),
        ("--block_len 8 --corruption bernoulli", "needs corruption=count"),
        ("--objective ar --block_len 8", "block_len=8 with an autoregressive model"),
        ("--objective ar --time_conditioning adaln", "no noise level"),
        ("--objective uniform --loss_weighting clip", "loss_weighting=elbo or full or flat"),
        ("--objective uniform --ar_weight 1", "a clean half with blocks only"),
        ("--ar_weight 1", "only a model of uniform noise has that"),
        ("--objective ar --self_conditioning 0.5", "no masks and no noise level"),
        ("--objective uniform --corruption count", "needs corruption=bernoulli"),
        ("--objective ar --complementary", "needs complementary=False"),
        ("--objective ar --time_sampling importance", "needs time_sampling"),
        ("--time_sampling importance --loss_weighting pooled", "elbo, flat or clip"),
        ("--objective ar --loss_weighting full", "no masks"),
        ("--time_sampling importance --block_len 8", "needs time_sampling=uniform"),
        ("--data tales --max_documents 3", "max_documents=3 with tales"),
        ("--data one.txt --max_documents 3", "it is one document"),
    ),
)
def test_settings_that_a_family_cannot_have(words, message, monkeypatch, capsys):
    open("some.txt", "w").write("to be or not to be\n<|endoftext|>\n" * 200)
    open("one.txt", "w").write("to be or not to be " * 200)
    code, _, err = run(
        train.main,
        ["--data", "some.txt", "--seq_len", "32", *TINY, *words.split()],
        monkeypatch,
        capsys,
    )
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_needs_of_the_families_are_settings():
    """A name that is no setting would be a rule that nothing ever breaks."""
    known = {
        f.name
        for kind in (Config, SampleConfig, evaluate.EvaluateConfig)
        for f in dataclasses.fields(kind)
    }
    for family in FAMILIES.values():
        assert set(family.needs) <= known and set(family.why) <= known | {"left_to_right"}


@pytest.mark.parametrize("objective", ("ar", "uniform", "masked"))
def test_a_block_as_long_as_the_window_is_none(objective):
    words = [*"--data tales --seq_len 32 --rows stream --block_len 32".split(), *TINY]
    cfg, _ = load([*words, "--objective", objective])
    assert families.checked(cfg).block_len in (0, 1) and cfg.block_len == 32


def test_a_sampler_of_another_family(tales_run, monkeypatch, capsys):
    model = ["--checkpoint", str(tales_run / "models" / "tales.best.pt"), "--sampler", "reverse"]
    for main, more in ((inference.main, []), (evaluate.main, ["--num_samples", "1"])):
        code, _, err = run(main, [*model, *more], monkeypatch, capsys)
        assert code == 2 and "sampler=reverse with a masked model" in err, err


def test_a_negated_flag_takes_no_value():
    assert cli.parse(["--no-complementary"], Config)[1] == {"complementary": False}
    with pytest.raises(UserError, match="--complementary=true or --no-complementary"):
        cli.parse(["--no-complementary=true"], Config)


def test_what_a_family_cannot_write(monkeypatch, capsys):
    texts.write_documents("some.txt", iter(tales.generate(1, 200)))
    for name in ("ar", "blocks", "uniform"):
        train.train(
            dataclasses.replace(
                load(
                    [
                        *"--data some.txt --tokenizer char --seq_len 32".split(),
                        *TINY,
                        "--name",
                        name,
                        *FAMILY[name].split(),
                    ]
                )[0]
            ),
            quiet=True,
        )
    for name, words, message in (
        ("ar", "--suffix end --gen-len 5", "from left to right"),
        ("blocks", "--infill a[4]b", "from left to right"),
        ("ar", "--guidance 1", "guidance=1.0 with an autoregressive model"),
        ("blocks", "--decode-block 4", "decode_block=4 with a model of blocks of 8"),
        ("blocks", "--cache dual --decode-block 8", "keeps keys and values by itself"),
        ("uniform", "--sampler margin", "known: reverse, confidence, threshold, entropy_bounded"),
        ("uniform", "--sampler left_to_right", "known: reverse, confidence, threshold"),
        ("blocks", "--draft abc", "sees all of the text"),
        ("ar", "--draft abc --prompt a", "leave out --prompt"),
        ("uniform", "--gen-len 90", "no more than its window"),
        ("uniform", "--correctors 2 --sampler threshold", "they are of --sampler reverse"),
        ("ar", "--correctors 2", "only a model of uniform noise"),
    ):
        code, _, err = run(
            inference.main,
            ["--checkpoint", f"artifacts/models/{name}.best.pt", *words.split()],
            monkeypatch,
            capsys,
        )
        assert code == 2 and message in err.splitlines()[-1], (words, err)
    code, out, err = run(
        inference.main,
        "--checkpoint artifacts/models/uniform.best.pt --steps 5 --correctors 2 --infill a[4]b "
        "--sampler reverse",
        monkeypatch,
        capsys,
    )
    assert code == 0 and "13 network evaluations" in err and len(out) == 7, (out, err)


# --- inference ------------------------------------------------------------------------------------


def test_prompt_to_text_and_video(tales_run, monkeypatch, capsys):
    import av
    from PIL import Image

    code, out, err = run(
        inference.main,
        [
            "--checkpoint",
            str(tales_run / "models" / "tales.best.pt"),
            "--prompt",
            "Once upon a time",
            *(
                "--gen-len 9 --temperature 0.0 --viz-video media/x.mp4 --viz-gif "
                "media/x.gif --trace-every 2 --gif-frame-ms 100"
            ).split(),
        ],
        monkeypatch,
        capsys,
    )
    assert code == 0 and out.startswith("Once upon a time") and "9 network evaluations" in err
    with av.open("media/x.mp4") as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, float(stream.average_rate)) == (1280, 720, 10.0)
        pictures = [frame.to_image() for frame in file.decode(stream)]
    # the blank canvas, evaluations 2, 4, 6, 8, and the last one held for 3 s
    assert len(pictures) == 5 + 30
    assert len({picture.tobytes() for picture in pictures}) >= 6 and not os.path.exists(
        "media/x.mp4.tmp"
    )
    gif = Image.open("media/x.gif")
    assert gif.n_frames == 6 and gif.size == (640, 360)
    gif.seek(3)
    fresh = tuple(int(video.FRESH[i : i + 2], 16) for i in (1, 3, 5))
    assert fresh in {colour for _, colour in gif.convert("RGB").getcolors(2**20)}, (
        "few colours, but the right ones"
    )


def test_samples_are_reproducible_and_distinct(tales_run, monkeypatch, capsys):
    path = ["--checkpoint", str(tales_run / "models" / "tales.best.pt")]
    _, three, _ = run(
        inference.main, path + "--num-samples 3 --seed 5 --gen-len 12".split(), monkeypatch, capsys
    )
    _, second, _ = run(inference.main, path + "--seed 6 --gen-len 12".split(), monkeypatch, capsys)
    assert three.split("--- seed 6\n")[1].split("\n--- seed 7")[0] == second.rstrip("\n")
    assert three.count("--- seed") == 3 and len(set(three.splitlines())) == 6


def test_the_checkpoint_is_enough(tales_run, monkeypatch, capsys):
    """No corpus, no tokenizer file, no training code; and how to sample comes from the
    checkpoint."""
    state = checkpoint.read(str(tales_run / "models" / "tales.best.pt"))
    state["sample"] |= {"sampler": "ancestral", "steps": 3}
    os.makedirs("artifacts/models")
    torch.save(state, "artifacts/models/x.pt")
    code, _, err = run(inference.main, "--gen-len 12 --device cpu", monkeypatch, capsys)
    assert (
        code == 0
        and "x on cpu | ancestral" in err
        and int(err.split(" network")[0].split()[-1]) <= 3
    )
    code, _, err = run(
        inference.main,
        "--gen-len 12 --device cpu --sampler confidence --steps 6",
        monkeypatch,
        capsys,
    )
    assert "confidence, temperature 1 | 6 network evaluations" in err


# --- scripts --------------------------------------------------------------------------------------


def test_the_source_documents_commands(monkeypatch, capsys):
    """As they stand, but for the hub (a local file in its place), the size of the network and the
    number of its steps: each is a picture of the video, which takes as long as all else."""
    usual = checkpoint.sample_defaults()
    monkeypatch.setattr(
        checkpoint, "sample_defaults", lambda: usual | {"steps": 40, "sampler": "confidence"}
    )
    rows = [{"text": story} for story in tales.generate(5, 300)]
    open("local.jsonl", "w").write("\n".join(map(json.dumps, rows)))
    code, out, err = run(
        data_script.main,
        "--dataset local.jsonl --split train --num-stories 250 --seed 1337 --output "
        "data/stories.txt",
        monkeypatch,
        capsys,
    )
    assert code == 0 and "250 documents" in out, err
    assert set(texts.read_documents("data/stories.txt")) <= {row["text"] for row in rows}
    code, out, err = run(
        train_tokenizer.main,
        "--input data/stories.txt --output artifacts/tokenizer/tokenizer.json --vocab-size 600 "
        "--min-frequency 2",
        monkeypatch,
        capsys,
    )
    assert code == 0 and "599 tokens and MASK" in out, err
    code, out, err = run(train.main, ["--seq_len", "32", *TINY], monkeypatch, capsys)
    assert code == 0 and "preset stories_small: data/stories.txt has been prepared" in out, err
    assert "vocabulary 600" in out
    code, out, err = run(
        train.main, "--resume artifacts/models/stories_small.pt --max_iters 8", monkeypatch, capsys
    )
    assert code == 0, err
    code, out, err = run(
        inference.main,
        [
            "--checkpoint",
            "artifacts/models/stories_small.best.pt",
            "--prompt",
            "Once upon a time",
            *(
                "--gen-len 256 --temperature 0.0 --viz-video "
                "artifacts/media/diffusion_trace.mp4 --trace-every 1 --gif-frame-ms 180"
            ).split(),
        ],
        monkeypatch,
        capsys,
    )
    assert code == 0 and os.path.getsize("artifacts/media/diffusion_trace.mp4") > 5000, err


@pytest.mark.parametrize(
    "words, message",
    (
        ("--dataset none.txt", "there is no file"),
        ("--dataset none.jsonl", "there is no file"),
        ("--num-stories 0", "num_stories=0"),
        ("--dataset tales", "needs --output"),
        ("local.jsonl", "--dataset local.jsonl"),
        ("--dataset local.jsonl --text-column body --output x.txt", "no column body"),
        ("--dataset tales --num-stories 5 --output blocked/x.txt", "cannot write"),
        ("--datset x", "did you mean --dataset"),
    ),
)
def test_mistakes_in_data(words, message, monkeypatch, capsys):
    open("local.jsonl", "w").write('{"text": "hello"}')
    open("blocked", "w").write("a file")
    code, _, err = run(data_script.main, words, monkeypatch, capsys)
    assert code == 2 and message in err.strip().splitlines()[-1] and "Traceback" not in err, err


def test_wikitext_as_articles_and_per_word(monkeypatch, capsys):
    """From a text file and from rows as the hub has them, one a line; the bound is given per word,
    each line's end counted, whatever the tokens are."""
    lines = []
    for number, story in enumerate(tales.generate("wiki", 40)):
        lines += [" ", f" = Story {number} = ", " ", f" {story} "]
    open("wiki.txt", "w").write("\n".join(lines) + "\n")
    rows = [{"text": line.strip() and line + "\n"} for line in lines]
    open("wiki.jsonl", "w").write("".join(json.dumps(row) + "\n" for row in rows))
    for source in ("wiki.txt", "wiki.jsonl"):
        words = f"--dataset {source} --articles --output {source}.out --num-stories 30"
        code, out, err = run(data_script.main, words, monkeypatch, capsys)
        assert code == 0 and "wrote 30 documents" in out, err
    one, other = (texts.read_documents(f"wiki.{kind}.out") for kind in ("txt", "jsonl"))
    assert [text.split() for text in one] == [text.split() for text in other]
    assert one[7].strip().startswith("= Story 7 =")
    held = "--held_out wiki.jsonl.out --data wiki.txt.out --tokenizer bpe --vocab_size 300"
    train.train(load([*TINY, *held.split(), "--name", "wiki", "--rows", "stream"])[0], quiet=True)
    words = "--checkpoint artifacts/models/wiki.best.pt --num_samples 0 --json r.json --rows 9999"
    assert run(evaluate.main, words, monkeypatch, capsys)[0] == 0
    report = json.load(open("r.json"))
    state = checkpoint.read("artifacts/models/wiki.best.pt")
    bpe = tokenizer.from_json(state["tokenizer"])
    ids = [i for text in other for i in (*bpe.encode([text])[0], bpe.end)]
    a_word = len(ids) / sum(len(line.split()) + 1 for t in other for line in t.split("\n"))
    expected = report["bound_nats_per_token"] * a_word
    assert report["bound_nats_per_word"] == pytest.approx(expected, rel=0.01)
    assert report["perplexity_of_bound_per_word"] == pytest.approx(
        math.exp(report["bound_nats_per_word"])
    )
    rows = report["held_out_rows"]
    words = words.replace("--rows 9999", "--data wiki.jsonl.out")  # all of it
    assert run(evaluate.main, words, monkeypatch, capsys)[0] == 0
    assert json.load(open("r.json"))["held_out_rows"] == rows > state["config"]["final_rows"]


def test_data_options(monkeypatch, capsys):
    open("local.txt", "w").write("It â€œis.â€\n<|endoftext|>\ntwo")
    run(
        data_script.main,
        ["--dataset", "local.txt", "--output", "a.txt", "--separator", "\\n\\n"],
        monkeypatch,
        capsys,
    )
    assert open("a.txt").read() == "It “is.”\n\ntwo"
    run(
        data_script.main,
        "--dataset local.txt --output b.txt --no-clean-mojibake",
        monkeypatch,
        capsys,
    )
    assert open("b.txt").read() == "It â€œis.â€\n<|endoftext|>\ntwo"
    run(data_script.main, "--dataset tales --num-stories 4 --output c.txt", monkeypatch, capsys)
    assert len(texts.read_documents("c.txt")) == 4


def test_evaluate(tales_run, monkeypatch, capsys):
    """The metrics block of the end of training, from the checkpoint alone; other samples and a
    judge on request."""
    path = str(tales_run / "models" / "tales.best.pt")
    code, out, err = run(
        evaluate.main,
        [
            "--checkpoint",
            path,
            *"--json report.json --plot levels.png --device cpu --left_to_right 2".split(),
        ],
        monkeypatch,
        capsys,
    )
    assert code == 0, err
    report = json.load(open("report.json"))
    final = json.load(open(tales_run / "logs" / "tales.json"))
    assert open("levels.png", "rb").read(4) == b"\x89PNG"
    for key, value in final.items():
        if key in report and key != "samples":
            assert (
                report[key] == pytest.approx(value, rel=1e-6)
                if isinstance(value, float)
                else report[key] == value
            ), key
    different = {key for key, value in final["samples"].items() if report["samples"][key] != value}
    assert different <= {"tokens_per_second"} and set(final) - set(report) == {
        *(
            "name parameters steps best_step minutes seconds_a_step tokens_per_second_of_training"
        ).split()
    }
    assert {
        *(
            "accuracy entropy levels exp_of_masked_ce_schedule_dependent "
            "perplexity_of_bound reference"
        ).split()
    } <= set(final)
    assert report["left_to_right_rows"] == 2 and 0 < report["left_to_right_nats_per_token"] < 10
    words = ["--checkpoint", path, *"--num_samples 3 --rows 4 --json report.json --steps 8".split()]
    code, out, err = run(evaluate.main, words, monkeypatch, capsys)
    samples = json.load(open("report.json"))["samples"]
    assert samples["samples"] == 3 and samples["valid"] == 0 and samples["nfe_a_sample"] == 8
    assert json.load(open("report.json"))["reference"]["valid"] == 1 and "held-out text" in out


def test_judged_and_sampled_as_it_was_trained(monkeypatch, capsys):
    """bfloat16 on a machine where it is slow, and float32 on one that need not, unless --dtype says
    otherwise; the same samples as the checkpoint's author wanted. So a metrics block and a text can
    be had again anywhere."""
    monkeypatch.setattr(runtime, "has_bfloat16", lambda device: True)
    written = {}
    for dtype in ("bfloat16", "float32"):
        cfg = settings(dtype=dtype, name=dtype, final_samples=2)
        written[dtype] = train.train(cfg, quiet=True)
    assert written["bfloat16"]["bound_nats_per_token"] != written["float32"]["bound_nats_per_token"]
    texts_of = {}
    for here in (True, False):
        monkeypatch.setattr(runtime, "has_bfloat16", lambda device: here)
        for dtype, final in written.items():
            path = f"artifacts/models/{dtype}.best.pt"
            code, out, err = run(
                evaluate.main,
                ["--checkpoint", path, "--json", "r.json", "--device", "cpu"],
                monkeypatch,
                capsys,
            )
            report, slow = json.load(open("r.json")), dtype == "bfloat16" and not here
            assert (
                code == 0
                and ("is slow on the cpu of this machine" in err) == slow
                and report["dtype"] == dtype == final["dtype"]
            ), err
            assert all(
                report[key] == value
                for key, value in final.items()
                if key in report and key != "samples"
            )
            code, out, err = run(
                inference.main,
                ["--checkpoint", path, "--json", "--gen-len", "20", "--device", "cpu"],
                monkeypatch,
                capsys,
            )
            assert (
                code == 0 and err.count(f"bfloat16, in which {path} was trained, is slow") == slow
            )
            texts_of.setdefault(dtype, set()).add(str(json.loads(out)["confidence"]))
            code, out, err = run(
                evaluate.main,
                ["--checkpoint", path, *"--json r.json --dtype float32 --num_samples 0".split()],
                monkeypatch,
                capsys,
            )
            assert code == 0 and not err and json.load(open("r.json"))["dtype"] == "float32"
    assert [len(found) for found in texts_of.values()] == [1, 1] and texts_of[
        "bfloat16"
    ] != texts_of["float32"]
    state = checkpoint.read("artifacts/models/float32.best.pt")
    torch.save(
        state | {"sample": state["sample"] | {"sampler": "random", "steps": 4, "temperature": 0.5}},
        "mine.pt",
    )
    run(
        evaluate.main,
        "--checkpoint mine.pt --json r.json --num_samples 1 --rows 1",
        monkeypatch,
        capsys,
    )
    assert (
        json.load(open("r.json"))["sampling"]
        == "sampler random, steps 4, temperature 0.5, top_p 0.98"
    )
    run(
        evaluate.main,
        "--checkpoint mine.pt --json r.json --num_samples 1 --rows 1 --steps 3 --top_p 1 "
        "--temperature 0.8:0.4",
        monkeypatch,
        capsys,
    )
    assert (
        json.load(open("r.json"))["sampling"]
        == "sampler random, steps 3, temperature 0.8, final_temperature 0.4, top_p 1.0"
    )


def test_a_machine_told_to_be_old(monkeypatch):
    """ATEN_CPU_CAPABILITY=avx2 makes one without bfloat16, as PyTorch then computes."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for capability, expected in (("AVX512", True), ("AVX2", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        assert runtime.has_bfloat16(torch.device("cpu")) is expected
        assert runtime.choose_dtype("auto", torch.device("cpu")) == (
            torch.bfloat16 if expected else torch.float32
        )


@pytest.mark.parametrize("seconds, expected", [(1.0, True), (4.0, False), (1.9, False)])
def test_bfloat16_that_does_not_pay(seconds, expected, monkeypatch):
    """AVX-512 has it on CPUs where it is half as fast as float32: it is timed, where there is no
    AMX."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    took = {torch.bfloat16: seconds, torch.float32: 2.0}
    monkeypatch.setattr(runtime, "seconds_of_product", took.get)
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        assert runtime.has_bfloat16(torch.device("cpu")) is (expected or amx)


def test_types_are_timed_on_one_core(monkeypatch):
    """On a busy machine two threads wait for each other: a run took float32, of which a step was
    twice as long as of bfloat16."""
    threads, clock = [], runtime.time.perf_counter
    monkeypatch.setattr(
        runtime.time, "perf_counter", lambda: threads.append(torch.get_num_threads()) or clock()
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert runtime.seconds_of_product.__wrapped__(torch.float32, size=8) > 0
        assert set(threads) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_compiled_code_is_kept_by_the_kind_of_cpu(monkeypatch):
    """What was compiled for AVX-512 is no code for AVX2; a folder that the user chose stays."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    found = []
    for before, capability in ((None, "AVX512"), (default_cache_dir(), "AVX2"), ("/mine", "AVX2")):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before or "")
        if before is None:
            monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        runtime.keep_compiled_apart()
        found.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert found == [default_cache_dir() + "_AVX512", default_cache_dir() + "_AVX2", "/mine"]


@pytest.mark.parametrize(
    "error",
    (
        MemoryError("x"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate 4 bytes"
        ),
        torch.OutOfMemoryError("x"),
    ),
)
def test_no_memory_is_one_line(error, monkeypatch, capsys):
    def main(words):
        raise error

    code, _, err = run(main, "", monkeypatch, capsys)
    assert code == 2 and "too little memory" in err and len(err.splitlines()) == 1


def test_many_samples_are_written_in_batches(tales_run, monkeypatch, capsys):
    """Memory does not grow with their number, and each is what it would be alone."""
    words = [
        "--checkpoint",
        str(tales_run / "models" / "tales.best.pt"),
        *(
            "--json --gen-len 8 --num-samples 5 --device cpu --dtype float32 --sampler "
            "first_hitting"
        ).split(),
    ]
    results, sample, sizes = [], diffusion.sample, []
    monkeypatch.setattr(
        diffusion,
        "sample",
        lambda family, model, blank, *how, **more: (
            sizes.append(len(blank)) or sample(family, model, blank, *how, **more)
        ),
    )
    for at_once in (2**26, 2 * 9 * 800):
        monkeypatch.setitem(runtime.AT_ONCE, "cpu", at_once)
        code, out, err = run(inference.main, words, monkeypatch, capsys)
        results.append([json.loads(line) for line in out.splitlines()])
        assert code == 0, err
    assert sizes == [5, 2, 2, 1] and len({result["text"] for result in results[0]}) == 5
    for one, other in zip(*results, strict=True):
        assert one["text"] == other["text"] and one["confidence"] == pytest.approx(
            other["confidence"], abs=1e-3
        )


def test_evaluate_another_text(tales_run, monkeypatch, capsys):
    """All of the text is held out; the run's own bound is another."""
    path = str(tales_run / "models" / "tales.best.pt")
    open("other.txt", "w").write("\n<|endoftext|>\n".join(["The cat sat on a red mat. " * 4] * 20))
    code, out, err = run(
        evaluate.main,
        ["--checkpoint", path, *"--data other.txt --json r.json --num_samples 2 --rows 50".split()],
        monkeypatch,
        capsys,
    )
    report = json.load(open("r.json"))
    assert (
        code == 0
        and report["held_out_rows"] >= 20
        and "exact_nats_per_story" not in report
        and "valid" not in report["samples"]
    )


def test_evaluate_compares_what_compares(tales_run, monkeypatch, capsys):
    """The same rows by nats per token, in pairs; other tokens by bits per character; other text not
    at all."""
    path = str(tales_run / "models" / "tales.best.pt")
    against = lambda other, *words: run(
        evaluate.main,
        ["--checkpoint", path, "--against", other, "--rows", "8", *words],
        monkeypatch,
        capsys,
    )
    code, out, _ = against(path)
    assert (
        code == 0
        and "on the 8 rows that both have: the first has +0.0000 ± 0.0000 nats per token" in out
    )
    bounds = [torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [2.5], [4.5]])]
    with monkeypatch.context() as patch:
        patch.setattr(diffusion.Masked, "nelbo", lambda *_: bounds.pop(0))
        code, out, _ = against(path)
    assert "the first has -1.0000 ± 0.2887 nats per token" in out, (
        "standard deviation 0.5 over the root of 3"
    )
    code, _, err = against(path, "--json", "x.json")
    assert code == 2 and "leave out --json" in err
    train.train(
        dataclasses.replace(load(["tales", *TINY, "--tokenizer", "char", "--seq_len", "330"])[0]),
        quiet=True,
    )
    code, out, _ = against("artifacts/models/tales.best.pt")
    assert code == 0 and "the same text in other tokens" in out and "bits per character" in out
    train.train(dataclasses.replace(load(["tales", *TINY, "--seed", "2"])[0]), quiet=True)
    code, out, _ = against("artifacts/models/tales-2.best.pt")
    assert code == 0 and "not comparable" in out and out.count("bits per character") == 2


def test_a_judge_is_autoregressive(tales_run, monkeypatch, capsys):
    path = str(tales_run / "models" / "tales.best.pt")
    code, _, err = run(evaluate.main, ["--checkpoint", path, "--judge", path], monkeypatch, capsys)
    assert code == 2 and "objective=masked; a judge must give exact likelihoods" in err
    words = ["--checkpoint", path, "--judge", path, "--num_samples", "0"]
    code, _, err = run(evaluate.main, words, monkeypatch, capsys)
    assert code == 2 and "say how many: --num_samples 64" in err and err.count("\n") == 1
    train.train(dataclasses.replace(load(["tales", *TINY, "--objective", "ar"])[0]), quiet=True)
    code, out, err = run(
        evaluate.main,
        ["--checkpoint", path, "--judge", "artifacts/models/tales.best.pt", "--json", "r.json"],
        monkeypatch,
        capsys,
    )
    report = json.load(open("r.json"))
    assert code == 0 and 0.1 < report["reference"]["judge_nats_per_character"] < 4, err


def test_export_and_back(tales_run, monkeypatch, capsys):
    """`tokenizers` and `safetensors` read it; and what comes back writes the same text."""
    import safetensors.torch
    import tokenizers

    path = str(tales_run / "models" / "tales.best.pt")
    code, out, err = run(
        export.main, ["--checkpoint", path, "--output", "out"], monkeypatch, capsys
    )
    assert code == 0 and sorted(os.listdir("out")) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ], err
    weights = safetensors.torch.load_file("out/model.safetensors")
    state = checkpoint.read(path)
    assert weights.keys() == state["model"].keys() - {"head.weight"} and all(
        torch.equal(weights[k], state["model"][k]) for k in weights
    )
    assert tokenizers.Tokenizer.from_file("out/tokenizer.json").encode("a cat").ids
    assert (
        run(export.main, "--back out --output artifacts/models/mine.best.pt", monkeypatch, capsys)[
            0
        ]
        == 0
    )
    texts = [
        run(
            inference.main,
            ["--checkpoint", p, "--seed", "3", "--device", "cpu"],
            monkeypatch,
            capsys,
        )[1]
        for p in (path, "artifacts/models/mine.best.pt")
    ]
    assert texts[0] == texts[1]
    for words, message in (
        ("--back out --output artifacts/models/mine.best.pt", "exists"),
        ("--back nowhere --output a.pt", "there is no checkpoint nowhere"),
        ("--back out --output b", "say where to write"),
        ("--output b --dtype float16", "bfloat16"),
        ("--back out --output b.pt --dtype bfloat16", "leave out --dtype"),
    ):
        code, _, err = run(export.main, words, monkeypatch, capsys)
        assert code == 2 and message in err and err.count("\n") == 1


def test_checkpoints_from_before_accept_and_renoise():
    """Uniform noise was sampled by the reverse process, whatever the default's name said."""
    sampled = lambda objective, sampler: checkpoint.sampling(
        {"sample": {"sampler": sampler}, "config": {"objective": objective}}, "x.pt"
    )
    assert sampled("uniform", "entropy_bounded") == {"sampler": ""}
    for kept in (("masked", "entropy_bounded"), ("uniform", "entropy_bounded:3")):
        assert sampled(*kept) == {"sampler": kept[1]}


def test_a_canvas_is_exported_and_tuned(monkeypatch, capsys):
    """Its weights of self-conditioning too; and masks take them over."""
    train.train(settings(name="canvas", **config.CANVAS | {"block_len": 22}), quiet=True)
    path, how = "artifacts/models/canvas.best.pt", {"seed": 3, "steps": 6}
    code, _, err = run(export.main, ["--checkpoint", path, "--output", "out"], monkeypatch, capsys)
    assert code == 0, err
    found = [inference.load(name, device="cpu") for name in (path, "out")]
    text, nll = (
        [f(model) for model in found]
        for f in (
            lambda model: model.generate(**how).text,
            lambda model: model.nll("Once upon a time.", passes=2).nats,
        )
    )
    assert text[0] == text[1] and nll[0] == pytest.approx(nll[1], rel=1e-6)
    still = {"init_from": path, "max_iters": 1, "lr": 0.0, "muon_lr": 0.0}
    train.train(settings(name="tuned", **config.CANVAS | {"block_len": 11} | still), quiet=True)
    assert same(weights(path), weights("artifacts/models/tuned.pt"))
    train.train(settings(name="masked", self_conditioning=0.5, **still), quiet=True)
    assert same(weights(path), weights("artifacts/models/masked.pt"))
    with pytest.raises(UserError, match="give --self_conditioning 0.5"):
        train.train(settings(**still), quiet=True)


def test_export_in_bfloat16(tales_run, monkeypatch, capsys):
    """Half the size; what comes back is in float32 again, rounded, and writes."""
    path = str(tales_run / "models" / "tales.best.pt")
    for words in (
        ["--checkpoint", path, "--output", "whole"],
        ["--checkpoint", path, "--output", "half", "--dtype", "bfloat16", "--temperature", "0.5"],
        ["--checkpoint", "half", "--output", "falls", "--temperature", "0.8:0.4"],
        ["--checkpoint", "falls", "--output", "rests", "--temperature", "0.5"],
        "--back half --output half.pt".split(),
    ):
        code, _, err = run(export.main, words, monkeypatch, capsys)
        assert code == 0, err
    sizes = {name: os.path.getsize(f"{name}/model.safetensors") for name in ("whole", "half")}
    assert 0.5 < sizes["half"] / sizes["whole"] < 0.6
    samples = [checkpoint.read(name)["sample"] for name in ("whole", "half.pt")]
    assert samples[1] == samples[0] | {"temperature": 0.5}
    falls = checkpoint.read("falls")["sample"]
    assert falls == samples[0] | {"temperature": 0.8, "final_temperature": 0.4}
    assert checkpoint.read("rests")["sample"] == samples[1]
    for words, message in (
        ("--temperature -1", "temperature=-1.0 must be at least 0"),
        ("--top_p 2", "top_p=2.0 must be at most 1"),
    ):
        code, _, err = run(export.main, f"--output none {words}", monkeypatch, capsys)
        assert code == 2 and message in err and not os.path.exists("none")
    before, after = (checkpoint.read(name)["model"] for name in (path, "half.pt"))
    for name, weights in before.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], weights.bfloat16().float())
    words = "--checkpoint half.pt --device cpu --steps 8"
    code, out, err = run(inference.main, words, monkeypatch, capsys)
    assert code == 0 and out.strip(), err


def test_bench(monkeypatch, capsys):
    """A training step is timed beside the micro-dLLMs' recipe; compiling is left out, it takes a
    minute."""
    open("tiny.py", "w").write(
        "config = {'preset': 'tales', 'n_layer': 1, 'n_head': 1, 'n_embd': 8, 'batch_size': 2}"
    )
    code, out, err = run(
        bench.main,
        [
            *"train tiny.py --rounds 1 --device cpu --variants".split(),
            "float32 eager",
            "--json",
            "b.json",
        ],
        monkeypatch,
        capsys,
    )
    assert code == 0, err
    report = json.load(open("b.json"))[0]
    assert report["rounds"] == 1
    assert {bench_training.SOURCE, "float32 eager"} <= set(report["variants"])
    for name, figures in report["variants"].items():
        assert name in out and figures["median_step_seconds"] > 0
        rows = (
            64 if name.startswith("the micro") or name.startswith("the same") else 2
        )  # the micro-dLLMs' recipe has its own
        assert figures["rows_a_step"] == rows
        assert figures["tokens_per_second"] == pytest.approx(
            rows * 67 / figures["median_step_seconds"]
        )
    tiny = cli.merge(Config, preset("tiny.py"))
    step, _ = bench_training.training_step(
        tiny, 300, torch.device("cpu"), torch.bfloat16, torchs_muon=True
    )
    assert step() > 0
    code, _, err = run(bench.main, "walk", monkeypatch, capsys)
    assert code == 2 and "bench.py train" in err


def test_bench_goes_on_without_what_fails(monkeypatch, capsys):
    """And torch's Muon is timed beside ours, whose own speed-up is from its pair with the sources'
    recipe."""
    seconds = {
        bench_training.SOURCE: 8.0,
        "bfloat16 compiled": 1.0,
        "bfloat16 compiled, torch.optim.Muon": 1.25,
    }

    def together(variants, *_):
        if "bfloat16 eager" in variants:
            raise UserError("bfloat16 eager: its process died")
        return {
            label: [(seconds[label] * drift, 8, 100, 0) for drift in (1, 3)] for label in variants
        }, 1e12

    monkeypatch.setattr(bench_training, "time_together", together)
    monkeypatch.setattr(bench.runtime, "has_bfloat16", lambda device: True)
    open("tiny.py", "w").write(
        "config = {'preset': 'tales', 'n_layer': 1, 'n_head': 1, 'n_embd': 8, 'batch_size': 32}"
    )
    code, _, err = run(
        bench.main,
        "train tiny.py --device cpu --variants bfloat16 --json b.json",
        monkeypatch,
        capsys,
    )
    assert code == 0 and "left out: bfloat16 eager: its process died" in err
    found = {
        label: figures["speed_up"]
        for label, figures in json.load(open("b.json"))[0]["variants"].items()
    }
    assert found == {
        bench_training.SOURCE: 1.0,
        "bfloat16 compiled": 4.0,
        "bfloat16 compiled, torch.optim.Muon": pytest.approx(3.2),
    }
    code, _, err = run(
        bench.main,
        ["train", "tiny.py", "--device", "cpu", "--variants", "bfloat16 eager"],
        monkeypatch,
        capsys,
    )
    assert code == 2 and err.strip().endswith("its process died")


def test_bench_where_the_sources_recipe_does_not_fit(monkeypatch, capsys):
    """On a small GPU, say, where each variant is timed alone; ours are shown without a speed-up."""

    def alone(variants, *_):
        if bench_training.SOURCE in variants:
            raise UserError("out of memory")
        return {label: [(1.0, 8, 100, 0)] for label in variants}, 1e12

    monkeypatch.setattr(bench_training, "time_together", alone)
    monkeypatch.setattr(bench_training, "device_name", lambda device: "a small GPU")
    monkeypatch.setattr(bench.runtime, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(bench.runtime, "choose_device", lambda name: torch.device("cuda"))
    code, out, err = run(bench.main, "train tales --json b.json", monkeypatch, capsys)
    assert code == 0 and "out of memory" in err
    found = {
        label: figures["speed_up"]
        for label, figures in json.load(open("b.json"))[0]["variants"].items()
    }
    assert found["bfloat16 compiled, torch.optim.Muon"] is None and set(found.values()) == {None}


def test_bench_samples(monkeypatch, capsys):
    open("tiny.py", "w").write(
        "config = {'preset': 'tales', 'n_layer': 1, 'n_head': 1, 'n_embd': 8, 'seq_len': 16}"
    )
    code, out, err = run(
        bench.main,
        "sample tiny.py --rounds 1 --steps 4 --batches 1,2 --device cpu --json b.json",
        monkeypatch,
        capsys,
    )
    assert code == 0, err
    rows = {(row["batch"], row["sampler"]): row for row in json.load(open("b.json"))[0]["rows"]}
    assert (
        rows[1, "the micro-dLLMs' procedure, float32"]["nfe"] == 101
        and rows[2, "confidence"]["nfe"] == 4
    )
    assert {sampler for batch, sampler in rows if batch == 2} >= set(policies.SAMPLERS)
    code, out, _ = run(
        bench.main,
        "sample tiny.py --rounds 1 --batches 1 --device cpu --samplers local_entropy:8,random",
        monkeypatch,
        capsys,
    )
    assert code == 0 and "local_entropy:8 " in out and "first_hitting" not in out
    for words, message in (
        ("--batches 1,x", "batches=1,x"),
        ("--samplers ranom", "did you mean random"),
    ):
        code, _, err = run(bench.main, f"sample {words}", monkeypatch, capsys)
        assert code == 2 and message in err


def test_bench_video(monkeypatch, capsys):
    open("tiny.py", "w").write(
        "config = {'preset': 'tales', 'n_layer': 1, 'n_head': 1, 'n_embd': 8}"
    )
    code, out, err = run(
        bench.main, "video tiny.py --rounds 1 --warm_up 0 --json b.json", monkeypatch, capsys
    )
    assert (
        code == 0
        and json.load(open("b.json"))[0]["frames"] == 101
        and "256 tokens x 101 frames" in out
    ), err


@pytest.mark.parametrize("name", variants.TRAINED)
def test_every_variant_of_a_training_comparison_is_allowed(name):
    options = cli.merge(ablate.AblateConfig, {})
    for base in ("", "tales", "stories"):
        options = dataclasses.replace(options, base=base)
        plain = cli.merge(Config, variants.base_config(options))
        configs = [
            cli.merge(Config, variants.base_config(options), changes)
            for changes in variants.TRAINED[name](options).values()
        ]
        assert {(cfg.data, cfg.seed) for cfg in configs} == {(plain.data, plain.seed)}
        # the others compare by bits a byte
        assert name in ("window", "small", "own_text") or (
            {(c.rows, c.tokenizer) for c in configs} == {(plain.rows, plain.tokenizer)}
            and len({c.seq_len for c in configs}) == 1
        ), "all are judged on the same rows"
        if name == "recipe":
            assert sum(cfg == plain for cfg in configs) == 1, (
                "what the base has already is not compared with it"
            )


def test_ablate_trains_each_variant_once(monkeypatch, capsys):
    """Two seeds each, one variant diverges; the second call finds all done; another length is
    another group."""
    open("tiny.py", "w").write(
        "config = {'preset': 'tales', 'n_layer': 1, 'n_head': 1, 'n_embd': 8, 'batch_size': 4}"
    )
    texts.write_documents("my.txt", tales.generate("tests", 200))
    monkeypatch.setitem(
        variants.TRAINED,
        "weighting",
        lambda options: {
            "elbo": {},
            "flat": {"loss_weighting": "flat"},
            "mad": {"lr": 1e38, "grad_clip": 0.0},
        },
    )
    base = variants.base_config
    monkeypatch.setattr(
        variants, "base_config", lambda options: base(options) | {"eval_rows": 4, "final_rows": 8}
    )
    words = (
        "weighting --base tiny.py --iters 3 --seeds 2 --out_dir out --device cpu --dtype float32"
    )
    code, out, err = run(ablate.main, words, monkeypatch, capsys)
    assert code == 0 and "6 of 6" in out, err
    rows = ablate.read_table("out/weighting_tiny.csv")
    assert (
        len(rows) == 6
        and {row["seed"] for row in rows} == {"1", "2"}
        and rows[0]["bound"] != rows[1]["bound"]
    )
    assert [row["bound"] == "nan" for row in rows] == [False] * 4 + [True] * 2
    table = open("out/weighting_tiny.md").read().splitlines()
    assert table[0].startswith("data tales, n_layer 1") and "| data |" not in table[2], (
        "what all have in common stands above"
    )
    assert (
        len(table) == 4 + 3
        and " nan " in table[-1]
        and os.path.getsize("out/weighting_tiny.png") > 10_000
    )
    mean = (float(rows[0]["bound"]) + float(rows[1]["bound"])) / 2
    assert f"| {mean:.4g} |" in table[4]
    code, out, err = run(
        ablate.main,
        words.replace("tiny.py", "tiny.py --data my.txt --only elbo"),
        monkeypatch,
        capsys,
    )
    assert code == 0 and ablate.read_table("out/weighting_tiny_on_my.csv")[0]["data"] == "my.txt", (
        err
    )
    monkeypatch.setattr(train, "train", None)
    code, out, _ = run(ablate.main, words.replace("--seeds 2", ""), monkeypatch, capsys)
    assert code == 0 and "of 3" not in out
    assert open("out/weighting_tiny.md").read().splitlines() == table, (
        "all seeds count, also those of other calls"
    )


def test_ablate_ar_vs_diffusion(monkeypatch, capsys):
    """Training loss and bound of all variants on the first documents alone, in one figure."""
    texts.write_documents("my.txt", tales.generate("tests", 600))
    open("tiny.py", "w").write(
        "config = {'data': 'my.txt', 'tokenizer': 'char', 'rows': 'stream', 'n_layer': 1, "
        "'n_head': 1, 'n_embd': 8, "
        "'batch_size': 4, 'seq_len': 32}"
    )
    base, seen, load = variants.base_config, [], corpus.load
    monkeypatch.setattr(
        variants, "base_config", lambda options: base(options) | {"eval_rows": 4, "final_rows": 8}
    )
    monkeypatch.setattr(corpus, "load", lambda *args: seen.append(load(*args)) or seen[-1])
    code, out, err = run(
        ablate.main,
        "ar_vs_diffusion --base tiny.py --iters 3 --out_dir out --device cpu --dtype float32 "
        "--compile off",
        monkeypatch,
        capsys,
    )
    assert code == 0 and "6 of 6" in out, err
    rows = ablate.read_table("out/ar_vs_diffusion_tiny.csv")
    assert all(len(point.split(":")) == 4 for row in rows for point in row["curve"].split())
    assert os.path.getsize("out/ar_vs_diffusion_tiny.png") > 10_000
    whole = load(
        dataclasses.replace(
            compare_training.variant_config(
                "ar_vs_diffusion", cli.merge(ablate.AblateConfig, {"base": "tiny.py"}), "masked", 1
            ),
            max_documents=0,
        )
    )
    assert {data.tokens for data in seen} != {whole.tokens} and len(
        {data.tokens for data in seen}
    ) == 1
    assert 0.3 < seen[0].tokens / whole.tokens < 0.42, "200 of some 540"


def test_ablate_samplers(short_run, monkeypatch, capsys):
    """Every sampler gets a row, a second call does nothing again, and the figure is drawn."""
    monkeypatch.setattr(compare_samplers, "STEPS", (2,))
    monkeypatch.setattr(compare_samplers, "MORE_STEPS", (2,))
    monkeypatch.setattr(
        compare_samplers, "NUMBERS", {name: (0.5,) for name in compare_samplers.NUMBERS}
    )
    command = [
        "samplers",
        "--checkpoint",
        short_run,
        *"--num_samples 2 --out_dir x --device cpu".split(),
    ]
    code, out, err = run(ablate.main, [*command, "--only", "conf"], monkeypatch, capsys)
    assert code == 0 and out.count(": sampler") == 4, err
    code, out, err = run(ablate.main, command, monkeypatch, capsys)
    rows = ablate.read_table("x/samplers.csv")
    assert code == 0 and {row["sampler"].split(":")[0] for row in rows} == {
        *policies.SAMPLERS,
        "source",
    }
    assert {
        row["nfe"] for row in rows if (row["sampler"], row["decode_block"]) == ("confidence", "0")
    } == {"2", "15"}
    assert (
        open("x/samplers.md").read().count("\n") == len(rows) + 4
        and os.path.getsize("x/samplers.png") > 10_000
    )
    code, out, _ = run(ablate.main, command, monkeypatch, capsys)
    assert code == 0 and out.count(": sampler") == 0, "nothing is measured twice"
    code, out, _ = run(
        ablate.main, [*command, "--only", "margin", "--num_samples", "3"], monkeypatch, capsys
    )
    assert code == 0 and ablate.read_table("x/samplers.csv")[: len(rows)] == rows, (
        "other measurements are kept"
    )
    for words, message in (
        ("", "known: samplers"),
        ("sampler", "did you mean samplers"),
        ("samplers --num_samples 1", "num_samples=1"),
        (" ".join([*command, "--only", "x"]), "no setting of samplers begins so"),
        ("samplers --base tales", "trains nothing"),
    ):
        code, _, err = run(ablate.main, words, monkeypatch, capsys)
        assert code == 2 and message in err


def test_ablate_temperature(short_run, monkeypatch, capsys):
    command = [
        "temperature",
        "--checkpoint",
        short_run,
        *"--num_samples 2 --out_dir x --device cpu".split(),
    ]
    code, out, err = run(ablate.main, command, monkeypatch, capsys)
    assert (
        code == 0
        and len(ablate.read_table("x/temperature.csv")) == 16
        and os.path.getsize("x/temperature.png") > 10_000
    ), err


def test_ablate_order(tales_run, monkeypatch, capsys):
    """A network that knows how frequent each token is, and nothing else: in a random order,
    frequent ones come first no more often than later, and there are as many of them as in the
    training text."""
    monkeypatch.setattr(metrics, "SEARCHED", 5000)
    path = str(tales_run / "models" / "tales.best.pt")
    state = checkpoint.read(path)
    _, text, cfg = checkpoint.restore(state, torch.device("cpu"))
    training = samples.without_filling(
        corpus.load(cfg, text).training(state["step"], 5000), text, cfg
    )
    share = torch.bincount(training[training >= 0], minlength=text.mask).double()
    share /= share.sum()
    ranked = share.sort(descending=True).values
    frequent = ranked[ranked.cumsum(0) - ranked / 2 < 0.25].sum().item()

    class Unigram:
        vocab_size = text.vocab_size

        def __call__(self, ids, noise_level=None, select=None):
            return share.log().expand(len(select), -1)

    monkeypatch.setattr(compare_samplers, "model_of", lambda *_: (Unigram(), text, cfg, state))
    code, out, err = run(
        ablate.main,
        ["order", "--num_samples", "100", "--out_dir", "x", "--device", "cpu"],
        monkeypatch,
        capsys,
    )
    rows = ablate.read_table("x/order.csv")
    assert code == 0 and len(rows) == 4 and os.path.getsize("x/order.png") > 10_000, err
    at_random = {
        name: float(value)
        for name, value in rows[0].items()
        if name in ("frequent", "middle", "rare", "correlation", "early", "all")
    }
    assert rows[0]["sampler"] == "first_hitting" and abs(at_random.pop("correlation")) < 0.1
    assert at_random == pytest.approx(
        {"frequent": 0.5, "middle": 0.5, "rare": 0.5, "early": frequent, "all": frequent}, abs=0.05
    )
    in_turn = {name: float(rows[1][name]) for name in ("frequent", "middle", "rare")}
    assert rows[1]["sampler"] == "confidence" and all(0 <= place <= 1 for place in in_turn.values())


def test_ablate_spelling(tales_run, monkeypatch, capsys):
    """Held-out text is spelled as training text is; a model that is not told the time cannot be
    told a wrong one."""
    command = "spelling --num_samples 3 --out_dir x --device cpu --checkpoint".split()
    code, _, err = run(
        ablate.main, [*command, str(tales_run / "models" / "tales.best.pt")], monkeypatch, capsys
    )
    assert code == 2 and "--time_conditioning sinusoidal" in err
    open("my.txt", "w").write(
        "".join(
            f"\n{who}:\n{what}, sir\n"
            for who in ("ROMEO", "JULIET", "NURSE")
            for what in ("ay", "no")
        )
        * 60
    )
    train.train(
        load(
            "--data my.txt --tokenizer char --time_conditioning sinusoidal --seq_len 32".split()
            + TINY
        )[0],
        quiet=True,
    )
    code, _, err = run(ablate.main, [*command, "artifacts/models/my.best.pt"], monkeypatch, capsys)
    rows = {(row["sampler"], row["steps"]): row for row in ablate.read_table("x/spelling.csv")}
    assert (
        code == 0
        and len(ablate.read_table("x/spelling.csv")) == 18
        and os.path.getsize("x/spelling.png") > 10_000
    ), err
    truth, source = rows["held-out text", ""], rows["source", "101"]
    assert (float(truth["words"]), float(truth["speakers"])) == (1, 1) and int(
        truth["speaker_lines"]
    ) > 2
    assert float(source["words"]) < 0.9 and {row["nfe"] for row in rows.values()} > {
        "0",
        "32",
        "101",
    }


def test_a_wrong_clock():
    """What the masked-text-diffusion notes' sampler tells its network: at half of the steps half of
    the masks are left, and the cosine schedule has another share there."""
    told = []

    class Network:
        vocab_size = 6

        def __call__(self, ids, noise_level, select=None):
            told.append((noise_level[0].item(), (ids == 5).double().mean().item()))
            return torch.zeros(ids.numel(), 5)[select]

    setting = {"sampler": "notes, misled", "steps": 10, "temperature": 1.0, "top_p": 1.0}
    ids, nfe = compare_samplers.generate(Network(), MASKED, setting, torch.full((2, 20), 5), [1, 2])
    schedule = diffusion.mask_ratio("cos2_s008", torch.arange(10).flip(0) / 10)
    assert [level for level, _ in told] == pytest.approx(schedule.tolist()) and nfe.tolist() == [
        10,
        10,
    ]
    assert [share for _, share in told] == pytest.approx([1 - k / 10 for k in range(10)]) and not (
        ids == 5
    ).any()


# --- canvases and viewers, as users ask for them --------------------------------------------------


@pytest.fixture
def write(tales_run, monkeypatch, capsys):
    """A function: command line of inference.py -> (list of JSON results, stderr)."""

    def function(*words):
        code, out, err = run(
            inference.main,
            [
                "--checkpoint",
                str(tales_run / "models" / "tales.best.pt"),
                "--json",
                "--device",
                "cpu",
                *words,
            ],
            monkeypatch,
            capsys,
        )
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()], err

    return function


def test_infill_and_suffix(write):
    [result], _ = write(
        "--infill", "Once upon a time, a [1] bear named [2] lived [3].", "--no-stop"
    )
    plain = result["text"]
    assert (
        plain.startswith("Once upon a time, a") and " bear named" in plain and plain.endswith(".")
    )
    assert result["nfe"] == 6 and sum(step > 0 for step in result["step"]) == 6
    assert len(result["tokens"]) == len(result["confidence"]) == len(result["step"])
    [result], _ = write(
        "--prompt", "Once upon", "--suffix", " not sad any more.", "--gen-len", "4", "--no-stop"
    )
    assert result["text"].startswith("Once upon") and result["text"].endswith(" not sad any more.")
    [result], _ = write("--infill", r"a \[1] [2] b", "--no-stop")
    assert result["text"].startswith("a [1]")


def test_prompt_file_and_lengths(write):
    open("prompts.txt", "w").write("Once upon a time\n\nNear the lake, long ago,\n")
    results, err = write(
        "--prompt-file", "prompts.txt", "--gen-len", "6", "--num-samples", "2", "--no-stop"
    )
    assert [r["seed"] for r in results] == [1337, 1338, 1337, 1338]
    assert [r["text"][:9] for r in results] == ["Once upon", "Once upon", "Near the ", "Near the "]
    [alone], _ = write(
        "--prompt", "Near the lake, long ago,", "--gen-len", "6", "--seed", "1338", "--no-stop"
    )
    assert alone["text"] == results[3]["text"], "a row is the same whatever the batch"


def test_beyond_the_window(write):
    [result], _ = write(
        "--prompt", "Once upon a time", "--gen-len", "150", "--steps", "150", "--no-stop"
    )
    assert len(result["tokens"]) == 150 + 5 and result["text"].startswith("Once upon a time")
    assert max(result["step"]) == 150
    [cached], _ = write(
        *"--gen-len 40 --decode-block 8 --cache dual --sampler threshold:0.2 --no-stop".split()
    )
    assert len(cached["tokens"]) == 41
    [guided], _ = write("--prompt", "Once upon a time", "--gen-len", "8", "--guidance", "1.5")
    assert guided["nfe"] == 16


@pytest.mark.parametrize("sampler", ("entropy_bounded:20", "ancestral"))
def test_figures_are_of_the_row(sampler, write):
    words = "--gen-len", "30", "--sampler", sampler, "--no-stop"
    several, _ = write(*words, "--num-samples", "4", "--seed", "5")
    for result in several:
        [alone], _ = write(*words, "--seed", str(result["seed"]))
        assert all(alone[key] == result[key] for key in ("text", "nfe", "confidence", "step"))
    assert sampler != "ancestral" or len({result["nfe"] for result in several}) > 1


def test_all_viewers_of_one_stream(tales_run, monkeypatch, capsys):
    code, out, err = run(
        inference.main,
        [
            "--checkpoint",
            str(tales_run / "models" / "tales.best.pt"),
            *(
                "--prompt Once --gen-len 9 --live --sampler remdm_cap:0.3 --steps 8 "
                "--viz-html m/x.html --viz-gif m/x.gif"
            ).split(),
        ],
        monkeypatch,
        capsys,
    )
    assert code == 0 and out.startswith("Once") and "\x1b" not in out, err
    page = open("m/x.html", encoding="utf-8").read()
    data = json.loads(page.split("const data = ")[1].split(";\n")[0])
    assert (
        len(data["final"]) == 11
        and "remdm_cap:0.3" in data["title"]
        and len(data["steps"][1]["top"][0][1]) == 5
    )


@pytest.mark.parametrize(
    "words, message",
    (
        ("--infill none", "no hole"),
        ("--infill [2] --prompt x", "leave out"),
        ("--sampler confidence:2", "takes no number"),
        ("--sampler threshold:high", "expected a number"),
        ("--cache dual", "decode_block=0"),
        ("--prompt-file none", "cannot read"),
        ("--cache dual --decode-block 8 --guidance 1", "one or the other"),
        ("--live --json", "one or the other"),
        ("--gen-len 100 --decode-block 67", "longer than the window"),
        ("--min-tokens 0", "min_tokens=0"),
        ("--viz-html x.txt", "must end in .html"),
        ("--prompt x --prompt-file y", "one of them"),
    ),
)
def test_mistakes_in_canvases(words, message, tales_run, monkeypatch, capsys):
    code, _, err = run(
        inference.main,
        ["--checkpoint", str(tales_run / "models" / "tales.best.pt"), *words.split()],
        monkeypatch,
        capsys,
    )
    assert code == 2 and message in err.strip().splitlines()[-1] and "Traceback" not in err, err
