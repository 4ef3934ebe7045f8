"""Tales: a small probabilistic grammar of children's stories, the built-in corpus.

Real text has no known right answer: nobody can say how probable a sentence is, so nobody can say
whether a model that samples it is right. This grammar can. `generate` writes stories, `log_prob`
gives the exact probability of any text (-inf when it is no story), and `entropy` gives the exact
limit that no model's loss can go below. Names, pronouns, objects, places and feelings recur over a
whole story, so a model has to learn agreement over distance, which is what separates a language
model from a table of word pairs.

A grammar is data: variables (each a list of equally likely choices), forms (what a choice looks
like in the text) and plots (a list of places in the story, each with equally likely sentences). A
story draws a plot, a choice for every variable and a sentence for every place. To add a plot, add a
list to `PLOTS`; nothing else changes.
"""

import math
import random
import re
from itertools import islice
from typing import NamedTuple

# --- what a story is made of ----------------------------------------------------------------------

GIRLS = "Mia Lily Anna Ruby Nora Ella Rosie Clara".split()
BOYS = "Tom Ben Max Leo Jack Oscar Finn Hugo".split()
KINDS = ("child", "bear", "rabbit", "mouse", "fox", "kitten", "puppy", "hedgehog")

VARIABLES = {
    "hero": [(name, kind) for name in GIRLS + BOYS for kind in KINDS],
    "trait": "little brave kind shy merry clever gentle curious".split(),
    "place": (
        "by the river, on the hill, in the forest, near the lake, in the garden, by the sea, in "
        "the valley, on the farm"
    ).split(", "),
    "colour": "red blue green yellow white golden purple silver".split(),
    "object": "kite ball drum boat hat bell lamp scarf".split(),
    "helper": "owl frog duck goat crow turtle squirrel horse".split(),
    "manner": "wise friendly tiny jolly patient sleepy grey quiet".split(),
    "feeling": "sad worried lonely gloomy upset cross".split(),
    "weather": "sunny windy rainy snowy foggy warm".split(),
    "time": "morning day evening".split(),
    "spot": (
        "under a bush, behind a rock, up a tree, inside a log, beside a well, below a bridge"
    ).split(", "),
}


def _pronoun(girl, boy):
    return "hero", lambda hero: girl if hero[0] in GIRLS else boy


FORMS = {  # placeholder -> (variable, what its choice looks like in the text)
    "name": ("hero", lambda hero: hero[0]),
    "kind": (
        "hero",
        lambda hero: hero[1] if hero[1] != "child" else "girl" if hero[0] in GIRLS else "boy",
    ),
    "he": _pronoun("she", "he"),
    "He": _pronoun("She", "He"),
    "his": _pronoun("her", "his"),
    "him": _pronoun("her", "him"),
    "Place": ("place", lambda place: place[0].upper() + place[1:]),
    **{name: (name, str) for name in VARIABLES if name != "hero"},
}

OPENING = [
    "Once upon a time, a {trait} {kind} named {name} lived {place}.",
    "{name} was a {trait} {kind} who had a small cosy home {place}.",
    "{Place}, long ago, there lived a {trait} {kind} named {name}.",
]

# The n-th sentences of all plots are equally long in words and punctuation marks: a network that
# sees a few words then knows which sentence they belong to, and minutes of training are enough.
# Stories end in two ways, for the same reason. Name, pronoun, helper and feeling recur in nearly
# every story, the rest seldom: what is seldom repeated is the last that a network learns to repeat.
PLOTS = {
    "lost": [
        OPENING,
        [
            "{He} had a {colour} {object} and took it everywhere.",
            "Every day {he} played with {his} new {colour} {object}.",
        ],
        [
            "One {weather} {time} the {object} was gone, and {name} felt {feeling}.",
            "But one {weather} {time} {he} lost the {object}, and felt {feeling}.",
        ],
        [
            "A {manner} {helper} came by and asked why {he} was {feeling}.",
            '"You look {feeling}, friend!" said a {manner} {helper}.',
        ],
        [
            "The {helper} found it {spot}, and they played {place}.",
            "So they found it {spot}, and {name} was {feeling} no more.",
        ],
    ],
    "wish": [
        OPENING,
        [
            "{He} wished for a {colour} {object} of {his} own.",
            "More than anything else {he} wanted a {colour} {object}.",
        ],
        [
            "But {name} had no money at all, and felt very {feeling}.",
            "{He} looked for one high and low, and felt very {feeling}.",
        ],
        [
            "A {manner} {helper} came by and asked why {he} was {feeling}.",
            '"You look {feeling}, friend!" said a {manner} {helper}.',
        ],
        [
            "The {helper} gave {him} a new {object}, and they played {place}.",
            "So the {helper} made {him} a {object}, and {name} was {feeling} no more.",
        ],
    ],
    "share": [
        OPENING,
        [
            "{He} would never share {his} lovely new {colour} {object}.",
            "{He} kept {his} {colour} {object} in a big box.",
        ],
        [
            "One {weather} {time} a {manner} {helper} begged {name} to please share it.",
            "One {weather} {time} {name} would not lend it to a {manner} {helper}.",
        ],
        [
            "Then {name} saw the {helper} go home, and felt {feeling}.",
            "Soon {name} had nobody to play with, and felt {feeling}.",
        ],
        [
            "So {name} shared it with the {helper}, and they played {place}.",
            "In the end {he} shared the {object}, and {name} was {feeling} no more.",
        ],
    ],
    "night": [
        OPENING,
        [
            "One {weather} {time} {he} followed a {colour} bird away.",
            "One {weather} {time} {he} took {his} {colour} {object} outside.",
        ],
        [
            "Night came, and {name} sat {spot} and felt {feeling}.",
            "Soon {name} got lost, hid {spot} and felt {feeling}.",
        ],
        [
            "A {manner} {helper} came by and asked why {he} was {feeling}.",
            '"You look {feeling}, friend!" said a {manner} {helper}.',
        ],
        [
            "Soon {he} and the {helper} were home, and they played {place}.",
            "So the {helper} took {him} safely home, and {name} was {feeling} no more.",
        ],
    ],
    "party": [
        OPENING,
        [
            "One {weather} {time} a {manner} {helper} had a party.",
            "And then came the birthday of a {manner} {helper}.",
        ],
        [
            "But {name} had no gift to bring along, and felt {feeling}.",
            '"No gift!" said {name}, and {he} felt very {feeling}.',
        ],
        [
            "So {he} made a lovely new {colour} {object} all by {him}self.",
            "So {he} found {his} old {object} and painted it bright {colour}.",
        ],
        [
            "The {helper} truly loved the pretty {object}, and they played {place}.",
            '"A {object}!" said the {helper}, and {name} was {feeling} no more.',
        ],
    ],
}


# every template is one sentence by this rule, so that `judge` can cut any text into sentences
SENTENCE_END = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]")) (?=[A-Z"])')


class Grammar(NamedTuple):
    variables: dict  # name -> list of equally likely choices
    forms: dict  # placeholder -> (variable, function from a choice to text)
    # name -> places in the story, each a list of equally likely sentences with {placeholders}
    plots: dict


TALES = Grammar(VARIABLES, FORMS, PLOTS)

# --- generating stories ---------------------------------------------------------------------------


def stream(seed, grammar=TALES):
    """Stories (iterator of str) without end, the same for the same seed (int or str) on every
    machine."""
    rng, plots = random.Random(seed), list(grammar.plots.values())
    # random.choice's result may change with Python
    pick = lambda choices: choices[int(rng.random() * len(choices))]
    while True:
        plot = pick(plots)
        chosen = {variable: pick(choices) for variable, choices in grammar.variables.items()}
        text = " ".join(pick(sentences) for sentences in plot)
        yield text.format_map(_Rendered(grammar.forms, chosen))


def generate(seed, n, grammar=TALES):
    """The first n stories (list of str) of `stream`."""
    return list(islice(stream(seed, grammar), n))


class _Rendered(dict):
    """placeholder -> text, computed when `str.format_map` asks for it."""

    def __init__(self, forms, chosen):
        self.forms, self.chosen = forms, chosen

    def __missing__(self, placeholder):
        variable, form = self.forms[placeholder]
        return form(self.chosen[variable])


# --- judging stories ------------------------------------------------------------------------------
# Text at a placeholder leaves a set of choices possible for its variable ("she" leaves the girls).
# A derivation is consistent when the sets of all placeholders of a variable share a choice.


class _Compiled(NamedTuple):
    patterns: dict  # sentence template -> (regex, placeholders in order)
    allowed: dict  # placeholder -> {text: frozenset of indices of the choices that read so}


_COMPILED = {}


def _compile(grammar):
    if id(grammar) in _COMPILED:  # the grammar is kept with the entry, so that its id stays its own
        return _COMPILED[id(grammar)][1]
    allowed = {}
    for placeholder, (variable, form) in grammar.forms.items():
        texts = allowed[placeholder] = {}
        for index, choice in enumerate(grammar.variables[variable]):
            texts.setdefault(form(choice), set()).add(index)
        allowed[placeholder] = {text: frozenset(indices) for text, indices in texts.items()}
    patterns = {}
    for plot in grammar.plots.values():
        for template in (t for sentences in plot for t in sentences):
            parts = re.split(r"\{(\w+)\}", template)
            regex = "".join(
                re.escape(part)
                if i % 2 == 0
                else "("
                + "|".join(map(re.escape, sorted(allowed[part], key=len, reverse=True)))
                + ")"
                for i, part in enumerate(parts)
            )
            patterns[template] = re.compile(regex), parts[1::2]
    _COMPILED[id(grammar)] = grammar, _Compiled(patterns, allowed)
    return _COMPILED[id(grammar)][1]


def _bind(match, placeholders, bound, grammar, allowed):
    """`bound` (variable -> possible choices) narrowed by one matched sentence, or None where it
    contradicts."""
    bound = dict(bound)
    for placeholder, text in zip(placeholders, match.groups()):
        variable, choices = grammar.forms[placeholder][0], allowed[placeholder][text]
        bound[variable] = bound.get(variable, choices) & choices
        if not bound[variable]:
            return None
    return bound


def _derivations(text, plot, grammar, bound, start=0):
    """Every way to read text[start:] as the rest of `plot`: yields the sets of choices that it
    leaves possible."""
    if not plot:
        if start == len(text):
            yield bound
        return
    patterns, allowed = _compile(grammar)
    for template in plot[0]:
        pattern, placeholders = patterns[template]
        match = pattern.match(text, start)
        if match and (narrowed := _bind(match, placeholders, bound, grammar, allowed)) is not None:
            end = match.end()
            if len(plot) == 1 or text[end : end + 1] == " ":
                yield from _derivations(text, plot[1:], grammar, narrowed, end + (len(plot) > 1))


def log_prob(story, grammar=TALES):
    """Exact natural-log probability (float) of `story` (str) under `generate`; -inf if it is no
    story.

    The sum over all derivations. Derivations of one text differ in plot or sentences, so their
    probabilities add.
    """
    total = 0.0
    for plot in grammar.plots.values():
        for bound in _derivations(story, plot, grammar, {}):
            shares = [
                len(indices) / len(grammar.variables[variable])
                for variable, indices in bound.items()
            ]
            total += math.prod(shares) / math.prod(map(len, plot)) / len(grammar.plots)
    return math.log(total) if total else -math.inf


def choices(story, grammar=TALES):
    """(name of the plot, {variable: choice, of those that it shows}) of what a story was made of;
    None where it is no story. There is one, as of `TALES` (a test checks it)."""
    for name, plot in grammar.plots.items():
        for bound in _derivations(story, plot, grammar, {}):
            chosen = {v: grammar.variables[v][min(indices)] for v, indices in bound.items()}
            return name, chosen
    return None


def entropy(grammar=TALES):
    """Exact entropy of a story in nats (float): what the best possible model needs for one.

    Exact because every story has one derivation (a test checks it) and a variable that occurs in a
    story is shown there in full: H = H(plot) + H(sentences | plot) + sum over variables of P(it
    occurs) log(number of choices).
    """
    total = math.log(len(grammar.plots))
    for plot in grammar.plots.values():
        nats = sum(math.log(len(sentences)) for sentences in plot)
        for variable, choices in grammar.variables.items():
            shows = lambda t: any(
                grammar.forms[p][0] == variable for p in re.findall(r"\{(\w+)\}", t)
            )
            absent = math.prod(
                1 - sum(map(shows, sentences)) / len(sentences) for sentences in plot
            )
            nats += (1 - absent) * math.log(len(choices))
        total += nats / len(grammar.plots)
    return total


def judge(story, grammar=TALES):
    """One verdict per sentence of `story` (list of str): "ok", "agreement" or "ungrammatical".

    ok            some sentence of the grammar reads so and fits all earlier sentences
    agreement     the grammar has such a sentence, but it contradicts an earlier one (another name,
                  object, place)
    ungrammatical no sentence of the grammar reads so, or it contradicts itself
    """
    patterns, allowed = _compile(grammar)
    verdicts, bound = [], {}
    for sentence in SENTENCE_END.split(story):
        readings = [
            (match, placeholders)
            for pattern, placeholders in patterns.values()
            if (match := pattern.fullmatch(sentence))
        ]
        if not any(_bind(m, p, {}, grammar, allowed) is not None for m, p in readings):
            verdicts.append("ungrammatical")
            continue
        fits = [b for m, p in readings if (b := _bind(m, p, bound, grammar, allowed)) is not None]
        verdicts.append("ok" if fits else "agreement")
        bound = fits[0] if fits else bound
    return verdicts
