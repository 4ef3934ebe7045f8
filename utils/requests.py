"""Tales on request: a story of utils/tales.py is asked for by some of its choices, so that the
exact probability of any answer is known, and whether it has what was asked for.

A request names so many facts of a story, from none to MOST, all numbers alike, each set of them
alike, in a random order. Which ones does not depend on the story, so that

    log p(story given request) = log p(story) - log p(what the request names)

where the story has it, and the latter is a product of shares: choices are made independently.
"""

import math
import random

from utils import tales
from utils.pairs import asked

MOST = 4  # facts of a request

ERRANDS = {  # plot -> how a request names it
    "lost": "a lost {}",
    "wish": "a wish for a {}",
    "share": "a {} to share",
    "night": "a night outside",
    "party": "a party with a {}",
}
FACTS = {  # fact -> (its words, from a plot and the choices of a story; how many there are of it)
    "name": (lambda plot, of: f"a hero called {of['hero'][0]}", len(tales.GIRLS + tales.BOYS)),
    "kind": (lambda plot, of: f"a {of['hero'][1]}", len(tales.KINDS)),
    **{
        variable: (lambda plot, of, v=variable, words=words: words.format(of[v]), len(choices))
        for variable, words, choices in (
            (name, words, tales.VARIABLES[name])
            for name, words in {
                "trait": "a {} hero",
                "place": "a home {}",
                "colour": "the colour {}",
                "helper": "the {}",
                "manner": "a {} visitor",
                "feeling": "a {} moment",
            }.items()
        )
    },
    "plot": (lambda plot, of: ERRANDS[plot].format(of.get("object")), len(tales.PLOTS)),
}
OBJECTS = len(tales.VARIABLES["object"])  # which the plot's words name too, but for the night's


def facts_of(story):
    """{fact: its words} of a story (str); None where it is none."""
    found = tales.choices(story)
    return found and {fact: words(*found) for fact, (words, _) in FACTS.items()}


def written(words):
    """The request (str) for facts in words (list of str)."""
    return f"A story with {', '.join(words)}." if words else "A story."


def read(request):
    """The words (list of str) of the facts that a request (str) names."""
    return request.removeprefix("A story").removeprefix(" with ").removesuffix(".").split(", ")


def generate(seed, n):
    """n Pairs of a request and a story, the same for the same seed (int or str)."""
    rng, found = random.Random(f"request {seed}"), []
    for story in tales.generate(seed, n):
        words, names = facts_of(story), list(FACTS)
        count = int(rng.random() * (MOST + 1))
        chosen = [words[names.pop(int(rng.random() * len(names)))] for _ in range(count)]
        found.append(asked(written(chosen), story))
    return found


def obeys(pair):
    """Whether the answer of a Pair is a story that has all that was asked for."""
    words = facts_of(pair.completion)
    return words is not None and named(pair.question) <= set(words.values())


def named(request):
    """The words (a set) of the facts that a request names."""
    return {words for words in read(request) if words}


def log_prob(pair):
    """Exact log-probability of the answer of a Pair given its request, in nats; -inf where it is no
    story, or not what was asked for."""
    if not obeys(pair):
        return -math.inf
    fact_of = {words: fact for fact, words in facts_of(pair.completion).items()}
    known = sum(nats(fact_of[words], words) for words in named(pair.question))
    return tales.log_prob(pair.completion) + known


def nats(fact, words):
    """-log of the probability of a fact in its words."""
    with_object = fact == "plot" and words != ERRANDS["night"]
    return math.log(FACTS[fact][1] * (OBJECTS if with_object else 1))


def entropy():
    """Exact entropy in nats of a story given its request, the mean over requests."""
    mean = sum(math.log(count) for _, count in FACTS.values())
    mean += (1 - 1 / len(tales.PLOTS)) * math.log(OBJECTS)
    return tales.entropy() - MOST / 2 / len(FACTS) * mean
