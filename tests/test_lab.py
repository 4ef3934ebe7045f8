"""The laboratory: what it says of stories."""

import os

import pytest
from conftest import TINY, load, run

import train
from scripts.lab import ablate, compare_stories
from scripts.lab import stories as checks
from utils import tales, texts

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
    real, written = rows
    assert float(real["known_words"]) > 0.8 and float(real["judge_perplexity"]) > 1
    assert float(written["nfe"]) > 1 and os.path.getsize("out/stories.png") > 10_000
    assert float(real["nfe"]) == 0 and real["judge"] == "artifacts/models/judge.best.pt"


CHOSEN = ("held-out text", "local_entropy:64")
