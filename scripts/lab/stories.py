"""Whether texts are stories, as far as a program can tell: words, ends, names and pronouns. A small
checker of English stories for children, with error rates of its own: `error_rates`."""

import re
from collections import Counter, defaultdict

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
HE = frozenset("he him his himself".split())
SHE = frozenset("she her hers herself".split())
# who may be meant by a pronoun beside a name
OTHERS = frozenset(
    "mom mommy mother dad daddy father grandma grandpa sister brother son daughter aunt uncle boy "
    "girl man woman lady king queen prince princess friend".split()
)
SWAPPED = dict(he="she", she="he", his="her", her="his", him="her") | {
    "himself": "herself",
    "herself": "himself",
    "hers": "his",
}


def sentences(text):
    return re.split(r"(?<=[.!?])[\"”’']*\s+", text)


def said_of(words):
    """ "he" or "she" where only such pronouns are among the words (list of str), else None."""
    he, she = (any(word.lower() in kind for word in words) for kind in (HE, SHE))
    return None if he == she else "he" if he else "she"


class Checker:
    """What the training stories (list of str) know.

    words    of them all
    names    words that stand with a capital inside of sentences, and hardly ever without one
    genders  {name: "he" or "she"}, where at least five sentences with that name alone have such a
             pronoun, and four fifths of them the same
    """

    def __init__(self, stories):
        self.words = {word for story in stories for word in WORD.findall(story)}
        inside, small, tales = Counter(), Counter(), Counter()
        for story in stories:
            found = re.findall(r"(?<=[a-z,] )([A-Z][a-z]+)\b", story)
            inside.update(found)
            tales.update(set(found))
            small.update(re.findall(r"\b[a-z]+\b", story))
        self.names = {
            word for word, n in inside.items() if tales[word] > 1 and 20 * small[word.lower()] <= n
        }
        counts = defaultdict(Counter)
        for story in stories:
            for words in map(WORD.findall, sentences(story)):
                names, gender = set(words) & self.names, said_of(words)
                if len(names) == 1 and gender:
                    counts[names.pop()][gender] += 1
        self.genders = {
            name: max(found, key=found.get)
            for name, found in counts.items()
            if sum(found.values()) >= 5 and max(found.values()) >= 0.8 * sum(found.values())
        }

    def names_stay(self, story):
        """Whether the first name of the story is named in its second half too, and no name there
        for the first time; None without names."""
        places = {}
        for match in WORD.finditer(story):
            if match[0] in self.names:
                places.setdefault(match[0], []).append(match.start() / len(story))
        if not places:
            return None
        first = next(iter(places.values()))
        return first[-1] > 0.5 and all(found[0] <= 0.5 for found in places.values())

    def pronouns_agree(self, story):
        """A bool for each sentence that has one name, of known gender, pronouns of one gender, and
        nobody else who may be meant: whether they agree."""
        agree = []
        for words in map(WORD.findall, sentences(story)):
            names, gender = set(words) & self.names, said_of(words)
            known = self.genders.get(next(iter(names), None))
            if len(names) == 1 and gender and known and not OTHERS & {w.lower() for w in words}:
                agree.append(gender == known)
        return agree

    def along(self, text, parts):
        """A dict for each of so many equal parts of a text: the share of its words that end four
        words which stood in the text before, whether it has the text's first name (None without
        names), and how many names it has that did not stand before."""
        words, seen, known, found = WORD.findall(text), set(), set(), []
        first = next((word for word in words if word in self.names), None)
        bounds = [len(words) * part // parts for part in range(parts + 1)]
        for start, end in zip(bounds, bounds[1:]):
            fours = [tuple(words[max(0, i - 3) : i + 1]) for i in range(start, end)]
            repeated = 0
            for four in fours:
                repeated += four in seen
                seen.add(four)
            names = self.names.intersection(words[start:end])
            found.append(
                {
                    "repeated": repeated / max(1, end - start),
                    "first_name": None if first is None else first in names,
                    "new_names": len(names - known),
                }
            )
            known |= names
        return found

    def figures(self, stories):
        """Shares (dict) of the stories (list of str): of words that the training stories have, of
        stories that end with a sentence, of those with names whose names stay, and of sentences
        whose pronouns agree."""
        words = [word for story in stories for word in WORD.findall(story)]
        ended = [bool(re.search(r"[.!?][\"”’']*$", story.strip())) for story in stories]
        stay = [stays for stays in map(self.names_stay, stories) if stays is not None]
        agree = [one for story in stories for one in self.pronouns_agree(story)]
        share = lambda found: sum(found) / len(found) if found else None
        return {
            "known_words": share([word in self.words for word in words]),
            "ended": share(ended),
            "names_stay": share(stay),
            "pronouns_agree": share(agree),
        }


def halves_of_two(stories):
    """Broken stories: the first half of each, and the second half of the next."""
    for one, other in zip(stories, stories[1:]):
        one, other = sentences(one), sentences(other)
        yield " ".join(one[: len(one) // 2] + other[len(other) // 2 :])


def swapped_pronouns(story):
    """The story with he for she and she for he."""
    both = SWAPPED | {old.capitalize(): new.capitalize() for old, new in SWAPPED.items()}
    return re.sub(r"\b(" + "|".join(both) + r")\b", lambda match: both[match[0]], story)


def error_rates(checker, stories):
    """How often (dict of shares) the checker is content with real stories (list of str), and with
    the same broken: names of halves that do not belong together, pronouns swapped."""
    with_names = [story for story in stories if checker.names_stay(story) is not None]
    real = checker.figures(stories)
    return {
        "names_stay": real["names_stay"],
        "names_stay_in_halves_of_two": checker.figures(list(halves_of_two(with_names)))[
            "names_stay"
        ],
        "pronouns_agree": real["pronouns_agree"],
        "pronouns_agree_swapped": checker.figures(list(map(swapped_pronouns, stories)))[
            "pronouns_agree"
        ],
    }
