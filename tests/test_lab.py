"""The laboratory: what it says of stories, and of how a step grows."""

import json
import math
import os
import random

import pytest
import torch
from conftest import TINY, load, run

import diffusion
import train
from scripts.lab import (
    ablate,
    bench,
    bench_growth,
    bench_training,
    compare_canvas,
    compare_stories,
    pictures,
    results,
    story_tables,
    variants,
)
from scripts.lab import stories as checks
from utils import tales, texts
from utils.cli import UserError
from utils.tokenizer import train_char

NAMES = [("Lily", "she"), ("Tom", "he"), ("Mia", "she"), ("Ben", "he")]


def story(name, gender, times=4):
    they = {"she": ("She", "her"), "he": ("He", "his")}[gender]
    body = f" Then {name} went to the park, and {gender} saw {they[1]} ball. {they[0]} was glad."
    return f"Once there was a child, {name}." + body * times


STORIES = [story(*named) for _ in range(3) for named in NAMES]


@pytest.fixture(scope="module")
def checker():
    return checks.Checker(STORIES)


def test_names_and_genders_are_learned(checker):
    assert checker.names == {name for name, _ in NAMES} and checker.genders == dict(NAMES)


def test_a_story_is_whole(checker):
    found = checker.figures(STORIES)
    assert found == {"known_words": 1, "ended": 1, "names_stay": 1, "pronouns_agree": 1}
    assert checker.figures(["There is no one."])["names_stay"] is None


def test_what_breaks_a_story_is_seen(checker):
    lily, tom = story("Lily", "she"), story("Tom", "he")
    [broken] = checks.halves_of_two([lily, tom])
    assert checker.names_stay(lily) and checker.names_stay(broken) is False
    assert checker.pronouns_agree(checks.swapped_pronouns(lily)) == [False] * 4
    assert checker.pronouns_agree("Lily saw Mom, and he went. Lily and Tom saw her.") == []
    figures = checker.figures([lily[:-1], "Zorg blipped."])
    assert figures["ended"] == 0.5 and figures["known_words"] < 1
    both = checker.along(f"{lily} {tom}", 2)
    assert [part["first_name"] for part in both] == [True, False]
    assert [part["new_names"] for part in both] == [1, 1] and both[0]["repeated"] > 0.5
    rates = checks.error_rates(checker, STORIES)
    assert rates["names_stay"] == rates["pronouns_agree"] == 1
    assert rates["names_stay_in_halves_of_two"] < 0.3 and rates["pronouns_agree_swapped"] == 0


def test_samplers_write_stories_that_are_judged(monkeypatch, capsys):
    """ablate.py stories: held-out text and a sampler, of a network that was trained on a file, by
    an autoregressive one."""
    texts.write_documents("some.txt", tales.generate("stories", 60))
    common = ["--data", "some.txt", "--tokenizer", "bpe", "--vocab_size", "300", *TINY]
    shape = ["--rows", "document", "--seq_len", "129", "--final_samples", "1"]
    for name, more in (("some", []), ("judge", ["--objective", "ar"])):
        train.train(load([*common, *shape, "--name", name, *more])[0], quiet=True)
    words = "stories --checkpoint artifacts/models/some.best.pt --num_samples 2 --device cpu"
    code, _, err = run(ablate.main, words, monkeypatch, capsys)
    assert code == 2 and "stories needs a --judge" in err
    settings = compare_stories.story_settings
    few = lambda options: [one for one in settings(options) if one["sampler"] in CHOSEN]
    monkeypatch.setitem(
        ablate.COMPARISONS, "stories", ablate.COMPARISONS["stories"]._replace(settings=few)
    )
    words += " --judge artifacts/models/judge.best.pt --out_dir out"
    code, out, err = run(ablate.main, words, monkeypatch, capsys)
    rows = ablate.read_table("out/stories.csv")
    assert code == 0 and [row["sampler"] for row in rows] == list(CHOSEN), err
    real, broken, written = rows
    assert broken["judge_perplexity"] == real["temperature"] == "" and broken["names_stay"] != ""
    assert float(real["known_words"]) > 0.8 and float(real["judge_perplexity"]) > 1
    assert float(written["nfe"]) > 1 and os.path.getsize("out/stories.png") > 10_000
    assert float(real["judge_se_texts"]) > 0 and real["judge"] == "artifacts/models/judge.best.pt"
    few = lambda options: compare_stories.block_settings(options)[:2]
    monkeypatch.setitem(
        ablate.COMPARISONS,
        "block_lengths",
        ablate.COMPARISONS["block_lengths"]._replace(settings=few),
    )
    code, out, err = run(
        ablate.main, words.replace("stories", "block_lengths", 1), monkeypatch, capsys
    )
    real, written = ablate.read_table("out/block_lengths.csv")
    assert code == 0 and os.path.getsize("out/block_lengths.png") > 10_000, err
    assert written["block_len"] == "129" and written["nfe"] == written["steps"] == "16"
    monkeypatch.setattr(compare_stories, "LONG", 400)
    monkeypatch.setitem(
        ablate.COMPARISONS,
        "long_stories",
        ablate.COMPARISONS["long_stories"]._replace(
            settings=lambda options: compare_stories.long_settings(options)[:2]
        ),
    )
    code, out, err = run(
        ablate.main, words.replace("stories", "long_stories", 1), monkeypatch, capsys
    )
    real, written = ablate.read_table("out/long_stories.csv")
    assert code == 0 and os.path.getsize("out/long_stories.png") > 10_000, err
    assert float(real["first_name_1"]) == 1 and float(real["new_names_1"]) >= 1
    assert float(real["judge_4"]) > 0 and float(written["nfe"]) > 1


CHOSEN = ("held-out text", "held-out text, broken", "local_entropy:64")


def test_growth_is_measured_and_shown(monkeypatch, capsys):
    """Exponents of what grows exactly; a step on shards is real."""

    def together(variants, vocabulary, device, products, options):
        steps = {}
        for value, (_, cfg, dtype, *_) in variants.items():
            if value == 1000:
                step, _ = bench_training.training_step(cfg, vocabulary, device, dtype)
                assert step() > 0
            # beyond the three GB of every process
            steps[value] = [(value**1.5 or 1, 8, 100, 2**30 * (3 + value**0.5))] * 3
        return steps, 1e12

    monkeypatch.setattr(bench_training, "time_together", together)
    monkeypatch.setitem(bench_growth.VALUES, "data", (1000, 2000, 4000))
    monkeypatch.setattr(bench_growth.shards, "SHARD_TOKENS", 1500)
    open("tiny.py", "w").write(
        "config = {'preset': 'stories_small', 'n_layer': 1, 'n_embd': 8, 'seq_len': 16}"
    )
    words = "growth tiny.py --device cpu --json artifacts/benchmarks/growth_cpu.json"
    code, out, err = run(bench.main, words, monkeypatch, capsys)
    assert code == 0 and "grows with n_embd: seconds as its power 1.50" in out, err
    [report] = json.load(open("artifacts/benchmarks/growth_cpu.json"))
    for found in report["exponents"].values():
        assert found == {
            "median_step_seconds": pytest.approx(1.5),
            "step_memory_gb": pytest.approx(0.5),
        }
    assert {row["setting"] for row in report["rows"]} == set(bench_growth.VALUES)
    results.load.cache_clear()
    monkeypatch.setattr(results, "ROOT", ".")
    pictures.growth(None, "growth.png")
    assert os.path.getsize("growth.png") > 10_000
    results.load.cache_clear()


def test_tables_of_stories(monkeypatch, tmp_path, request):
    """What an hour gives, beside the first of its columns; and texts as they were printed."""
    monkeypatch.setattr(results, "ROOT", str(tmp_path))
    request.addfinalizer(results.load.cache_clear)
    results.load.cache_clear()
    for folder in ("benchmarks", "samples"):
        (tmp_path / "artifacts" / folder).mkdir(parents=True)
    names = [f"benchmarks/{name}.json" for name in story_tables.HOUR.values()]
    for name, bits in zip(names, (1.5, 1.2, 1.0, 0.9, 0.8, 1.4), strict=True):
        report = dict.fromkeys("parameters steps best_step".split(), 1000) | {
            "seconds_a_step": 0.5,
            "minutes": 60.04,
            "passes_over_the_text": 20.4,
            "bound_nats_per_token": 2 * bits,
            "bound_se_masks": 0.02,
            "bound_bits_per_byte": bits,
            "bound_bits_per_byte_se_rows": 0.03,
        }
        (tmp_path / "artifacts" / name).write_text(json.dumps(report))
    printed = "--- seed 0\nOne day.\n\nThe end.\n--- seed 12\nTom said --- seed 3\n"
    (tmp_path / "artifacts/samples/some.txt").write_text(printed)
    lines = [f"{name},python a.py,two cores,2026-11-23" for name in [*names, "samples/some.txt"]]
    (tmp_path / "artifacts/sources.csv").write_text(
        "\n".join(["file,command,machine,date", *lines]) + "\n"
    )
    lines = story_tables.hour()
    beside = lambda label, cells: f"| beside the {label} | {cells} |" in lines
    assert beside("published recipe", "+0.0% | -20.0% | -33.3% | -40.0% | -46.7% | -6.7%")
    assert beside("autoregressive", "+66.7% | +33.3% | +11.1% | +0.0% | -11.1% | +55.6%")
    assert beside("autoregressive, float32", "+87.5% | +50.0% | +25.0% | +12.5% | +0.0% | +75.0%")
    assert "| minutes | 60.0 | 60.0 | 60.0 | 60.0 | 60.0 | 60.0 |" in lines
    assert "| 1.5000 (± 0.0300, ± 0.0100) | 1.2000 (± 0.0300, ± 0.0100) |" in "\n".join(lines)
    monkeypatch.setattr(story_tables, "WRITTEN", ("some",))
    lines = story_tables.written()
    assert "* seed 0: One day. The end." in lines and "* seed 12: Tom said --- seed 3" in lines
    row = dict(sampler="random", steps="16", decode_block="0", temperature="1.0", nfe="16.0")
    row |= {f"{name}_{part}": "0.5" for name in LONG_FIGURES for part in (1, 2, 3, 4)}
    cells = [of(row) for of in story_tables.LONG_STORIES.values()]
    assert cells[:3] == ["`random`, steps 16", "1", "16"] and cells[3:5] == [
        "0.50 0.50 0.50 0.50",
        "50% 50% 50% 50%",
    ]
    assert story_tables.STORIES["ended"](row) == "–"


LONG_FIGURES = ("judge", "repeated", "first_name", "new_names")


def test_long_reference_begins_where_stories_do(monkeypatch):
    """What may be the end of a story is left out, and a blank line stands between two."""
    monkeypatch.setattr(compare_stories, "LONG", 6)
    chars = train_char(["abc\n"], documents=True)
    rows = torch.tensor(chars.encode(["ab<abc<bb<aaaaaaa<bbbb".replace("<", "c")]))
    rows[rows == chars.encode(["c"])[0][0]] = chars.end
    found = compare_stories.long_reference(rows, chars, 5)
    assert [chars.decode(ids) for ids in found] == ["ab\n\nbb", "aaaaaa"]
    assert len(compare_stories.long_reference(rows, chars, 1)) == 1


def test_the_recipe_on_trial(monkeypatch, capsys):
    """ablate.py canvas: of a variant its samples at some NFE, and what it repairs; masked and of
    uniform noise, in blocks and not."""
    few = ("masked", "canvas", "canvas, one canvas")
    settings = lambda options: [
        one
        for one in compare_canvas.canvas_settings(options)
        if one["variant"] in few and (one["sampler"], one["steps"]) in wanted
    ]
    wanted = (
        ("entropy_bounded:0.1, cooled", ""),
        ("reverse", 8),
        ("entropy_bounded_strict:0.1, cooled", 8),
        ("repair 2", ""),
        ("repair 2, entropy_bounded:10", ""),
    )
    monkeypatch.setitem(
        ablate.COMPARISONS, "canvas", ablate.COMPARISONS["canvas"]._replace(settings=settings)
    )
    shape = dict(n_layer=1, n_head=2, n_embd=16, batch_size=4, final_rows=4)
    base = variants.base_config
    monkeypatch.setattr(variants, "base_config", lambda options: base(options) | shape)
    words = "canvas --base tales --iters 2 --num_samples 2 --device cpu --out_dir out"
    code, _, err = run(ablate.main, words, monkeypatch, capsys)
    rows = ablate.read_table("out/canvas_tales.csv")
    assert code == 0 and os.path.getsize("out/canvas_tales.png") > 10_000, err
    found = {(row["variant"], row["sampler"]): row for row in rows}
    assert found.keys() == {
        *((name, wanted[i][0]) for name in few[1:] for i in (1, 2, 4)),
        ("masked", "entropy_bounded:0.1, cooled"),
        ("masked", "repair 2"),
    }
    assert float(found["canvas, one canvas", "reverse"]["nfe"]) == 8
    mended = found["masked", "repair 2"]
    assert mended["repaired"] == "0" and float(mended["nfe"]) > 66 and not mended["distinct_2"]


def test_what_cannot_be_on_trial():
    for base, message in (
        ({"base": "tales_asked"}, "canvas is of texts"),
        ({"base": "gpt2"}, "canvas is of texts"),
        ({"base": "sudoku4"}, "canvas cuts rows into thirds"),
    ):
        with pytest.raises(UserError, match=message):
            compare_canvas.judge_canvas(ablate.AblateConfig(**base))


def test_all_variants_have_one_window():
    for base in ("", "tales", "sudoku", "stories_small"):
        options = ablate.AblateConfig(base=base)
        found = [compare_canvas.config_of(options, name) for name in variants.canvas(options)]
        assert len({cfg.seq_len for cfg in found}) == 1
        for cfg in found:
            bos = diffusion.bos_tokens(cfg)
            assert not cfg.block_len or (cfg.seq_len - bos) % cfg.block_len == 0
        masked = compare_canvas.config_of(options, "masked")
        assert masked.objective == "masked" and masked.block_len == 0


@pytest.mark.parametrize("corpus", ("--base sudoku", "--data own.txt"))
def test_the_recipe_on_trial_elsewhere(corpus, monkeypatch, capsys):
    """On grids puzzles are solved; on texts words are looked up."""
    open("own.txt", "w").write("a red kite flew over the old mill, and fell. " * 300)
    few = ("masked", "canvas, one canvas")
    settings = lambda options: [
        one
        for one in compare_canvas.canvas_settings(options)
        if one["variant"] in few
        and one["steps"] in ("", 8)
        and one["sampler"] in ("entropy_bounded:0.1", "reverse", "puzzles, reverse")
    ]
    monkeypatch.setitem(
        ablate.COMPARISONS, "canvas", ablate.COMPARISONS["canvas"]._replace(settings=settings)
    )
    shape = dict(n_layer=1, n_head=2, n_embd=16, batch_size=4, final_rows=4)
    base = variants.base_config
    monkeypatch.setattr(variants, "base_config", lambda options: base(options) | shape)
    words = f"canvas {corpus} --iters 2 --num_samples 2 --device cpu --out_dir out"
    code, _, err = run(ablate.main, words, monkeypatch, capsys)
    grids = "sudoku" in corpus
    stem = "out/canvas_sudoku" if grids else "out/canvas_on_own"
    assert code == 0 and os.path.getsize(f"{stem}.png") > 10_000, err
    rows = {(row["variant"], row["sampler"]): row for row in ablate.read_table(f"{stem}.csv")}
    assert len(rows) == (3 if grids else 2)
    share = float(rows["canvas, one canvas", "reverse"]["valid" if grids else "words"])
    assert share == 0 if grids else 0 <= share < 0.5, "a single letter may be a word"
    assert ("above_exact" in rows["masked", "entropy_bounded:0.1"]) == grids
    if grids:
        assert rows["canvas, one canvas", "puzzles, reverse"]["solved"] == "0"


def test_what_counts_as_repaired():
    """A valid story whose other words are as they were; restored: all are."""
    begin, place = "Once upon a time, a ", 5
    story = next(s for s in tales.generate("repaired", 50) if s.startswith(f"{begin}brave "))
    other = story.replace("brave", "little", 1)
    assert tales.log_prob(other) > -math.inf
    judged = lambda text, places: compare_canvas.judged([text], [story], [places])
    everything = {"valid": 1.0, "repaired": 1.0, "restored": 1.0}
    assert judged(story, [0, 3]) == everything
    assert judged(other, [place]) == everything | {"restored": 0.0}
    assert judged(other, [place + 1]) == everything | {"restored": 0.0, "repaired": 0.0}
    assert judged("nonsense", [0]) == dict.fromkeys(everything, 0.0)


def test_broken_stories_have_so_many_wrong_words():
    [text], rng = tales.generate("broken", 1), random.Random(1)
    for count in (1, 3):
        wrong, places = compare_canvas.broken(text, count, rng)
        pairs = zip(wrong.split(" "), text.split(" "), strict=True)
        assert [i for i, (a, b) in enumerate(pairs) if a != b] == sorted(places)
        assert len(places) == count
