import itertools
import math
import statistics

import pytest

from utils import tales
from utils.tales import TALES, Grammar, entropy, generate, judge, log_prob

SMALL = Grammar(
    {
        "hero": [("Mia", "bear"), ("Tom", "bear")],
        "trait": ["shy"],
        "place": ["by the sea", "on the hill"],
        "colour": ["red", "blue"],
        "object": ["kite", "ball"],
        "helper": ["owl"],
        "manner": ["wise"],
        "feeling": ["sad", "cross"],
        "weather": ["windy"],
        "time": ["day"],
        "spot": ["under a bush"],
    },
    TALES.forms,
    TALES.plots,
)


def every_story(grammar):
    for plot in grammar.plots.values():
        for sentences in itertools.product(*plot):
            for chosen in itertools.product(*grammar.variables.values()):
                yield " ".join(sentences).format_map(
                    tales._Rendered(grammar.forms, dict(zip(grammar.variables, chosen)))
                )


def test_stories_are_the_same_for_the_same_seed():
    assert generate(1, 5) == generate(1, 5) and generate(1, 5) != generate(2, 5)
    assert generate("train 3", 3)[:2] == generate("train 3", 2)


def test_every_generated_story_is_possible_and_grammatical():
    for story in generate(7, 1000):
        assert log_prob(story) > -math.inf, story
        assert set(judge(story)) == {"ok"}, (story, judge(story))


def test_probabilities_of_a_small_grammar_sum_to_one():
    stories = set(every_story(SMALL))
    assert len(stories) > 500
    assert sum(math.exp(log_prob(story, SMALL)) for story in stories) == pytest.approx(1, abs=1e-9)


def test_entropy_of_a_small_grammar_is_exact():
    """Which also shows that no story has two derivations: they would make it smaller than the
    formula says."""
    stories = set(every_story(SMALL))
    exact = -sum(math.exp(p) * p for p in (log_prob(story, SMALL) for story in stories))
    assert entropy(SMALL) == pytest.approx(exact, abs=1e-9)


def test_entropy_is_the_mean_surprise():
    surprise = [-log_prob(story) for story in generate("entropy", 3000)]
    error = statistics.stdev(surprise) / math.sqrt(len(surprise))
    assert abs(statistics.mean(surprise) - entropy()) < 4 * error


def test_there_are_more_than_a_billion_stories():
    """Even the likeliest story has a probability below 1e-9."""
    assert max(map(log_prob, generate(9, 3000))) < -9 * math.log(10)
    assert len(set(generate(10, 20_000))) == 20_000


def test_what_is_no_story_has_probability_zero():
    story = generate(11, 1)[0]
    words = story.split(" ")
    for broken in (
        "",
        story + " ",
        story[:-1],
        story + " " + story,
        story.replace(" a ", " an ", 1),
        " ".join(words[1:]),
        " ".join(words[:5] + ["zebra"] + words[6:]),
        story.lower(),
        story * 2,
    ):
        assert log_prob(broken) == -math.inf, broken


def test_broken_agreement_is_found():
    good = (
        "Once upon a time, a shy bear named Mia lived by the sea. She had a red kite and took it "
        "everywhere. One windy day the kite was gone, and Mia felt sad. A wise owl came by and "
        "asked why she was sad. The owl found it under a bush, and they played by the sea."
    )
    assert log_prob(good) > -math.inf and judge(good) == ["ok"] * 5
    for old, new, where in (
        ("She", "He", 1),
        ("the kite was", "the ball was", 2),
        ("and Mia felt", "and Tom felt", 2),
        ("she was sad", "he was sad", 3),
        ("was sad", "was cross", 3),
        ("The owl", "The frog", 4),
        ("played by the sea", "played on the hill", 4),
    ):
        bad = good.replace(old, new)
        assert bad != good and log_prob(bad) == -math.inf
        assert judge(bad) == ["agreement" if i == where else "ok" for i in range(5)], (
            old,
            new,
            judge(bad),
        )
    assert judge(good.replace("felt sad", "felt zebra")) == [
        "ok",
        "ok",
        "ungrammatical",
        "ok",
        "ok",
    ]
    assert judge("") == ["ungrammatical"]


def test_sentences_in_the_same_place_are_equally_long():
    """In all plots, so the position of a word tells which sentence it belongs to; see the comment
    at PLOTS."""
    import re

    def words(template):
        text = re.sub(r"\{(place|Place|spot)\}", "x x x", template).replace("{him}self", "x")
        return len(re.findall(r"\w+|[^\w\s]+", re.sub(r"\{\w+\}", "x", text)))

    for place in zip(*TALES.plots.values()):
        lengths = {words(template): template for sentences in place for template in sentences}
        assert len(lengths) == 1, lengths
