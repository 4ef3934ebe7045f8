"""The corpora that are made here, and of which everything is known: which texts there are, and how
probable each is. To add one, add a class like these and an entry of BUILT_IN."""

import functools
import math
from itertools import cycle, islice

import torch
from tqdm import tqdm

from utils import sudoku, tales, texts
from utils.runtime import generator, is_first

HELD_OUT = 2048  # texts


class Tales:
    """Stories of a grammar (utils/tales.py).

    noun, nouns    what a text is called, and several
    prompt         that one may begin with
    shortest       tokens of one, with any tokenizer that is trained here
    windows        how long a window has to be (str)
    of_characters  whether a token has to be a character
    """

    noun, nouns, prompt, of_characters = "story", "stories", "Once upon a time", False
    shortest, windows = 60, "67 with bpe, 320 with char"

    def generate(self, seed, n):
        """n texts (list of str), the same for the same seed (int or str)."""
        return tales.generate(seed, n)

    def training(self, seed, step, n):
        """n texts of a step of the runs with this seed, none of them held out."""
        found, held_out = self.generate(f"train {seed} {step}", n), set(self.held_out(seed))
        fresh = [story for story in found if story not in held_out]
        return (fresh * n)[:n]

    @functools.lru_cache(maxsize=8)
    def held_out(self, seed):
        """The held-out texts (list of str) of the runs with this seed."""
        return self.generate(f"held out {seed}", HELD_OUT)

    def log_prob(self, text):
        """Exact log-probability of a text in nats; -inf where it is none."""
        return tales.log_prob(text)

    def entropy(self):
        """Exact entropy of a text in nats."""
        return tales.entropy()

    def figures(self, texts):
        """What is known of sampled texts (list of str): shares in [0, 1], and nats.

        valid        whole stories of the grammar   grammatical  sentences that the grammar has
        agreeing     sentences that also fit the story so far
        distinct     different texts                log_prob     mean exact log-probability of the
                     valid ones; against -entropy: lower is broken, higher collapsed
        """
        log_probs = [p for text in texts if (p := tales.log_prob(text)) > -math.inf]
        verdicts = [verdict for text in texts for verdict in tales.judge(text)]
        count, sentences = max(1, len(texts)), max(1, len(verdicts))
        return {
            "samples": len(texts),
            "valid": len(log_probs) / count,
            "grammatical": sum(v != "ungrammatical" for v in verdicts) / sentences,
            "agreeing": sum(v == "ok" for v in verdicts) / sentences,
            "distinct": len(set(texts)) / count,
            "log_prob": sum(log_probs) / len(log_probs) if log_probs else None,
        }

    def verdict(self, text):
        """What is known of one text, in a line."""
        log_p = tales.log_prob(text)
        if log_p > -math.inf:
            return f"A story of the grammar, log-probability {log_p:.1f}"
        said = tales.judge(text)
        return f"No story of the grammar: {said.count('ok')} of {len(said)} sentences fit"

    def puzzles(self, n):
        """n held-out texts with holes that nothing else fills: (text with sudoku.HOLE, text) each;
        here there are none."""
        return []


CLUES = {4: 5, 6: 12, 9: 28}  # of puzzles, by side


class Sudoku:
    """Sudoku grids (utils/sudoku.py), all equally likely; `log_prob` and `entropy` are of that law.

    A tenth, by hash, is held out in every run: training draws from the others, so that its own law
    has an entropy that is smaller by some 0.1 nats. Of 4 x 4, some 29 grids are held out, and stand
    among the held-out texts many times. Methods: see Tales.
    """

    noun, nouns, prompt, of_characters = "grid", "grids", "", True

    def __init__(self, side):
        self.side, self.shortest = side, side * (side + 1)
        self.windows = str(1 + self.shortest)

    def generate(self, seed, n):
        return texts_of(sudoku.grids(self.side, n, generator("sudoku", seed)))

    def training(self, seed, step, n):
        found = self.generate(f"train {seed} {step}", n + n // 4 + 16)
        fresh = [text for text in found if not texts.is_held_out(text)]
        return (fresh * n)[:n]

    @functools.lru_cache(maxsize=8)
    def held_out(self, seed):
        found = filter(texts.is_held_out, self.generate(f"held out {seed}", 20 * HELD_OUT))
        return list(islice(found, HELD_OUT))

    def log_prob(self, text):
        return -self.entropy() if sudoku.is_grid(text, self.side) else -math.inf

    def entropy(self):
        return sudoku.entropy(self.side)

    def figures(self, texts):
        """Shares in [0, 1]: valid, whole grids; distinct, different texts."""
        count = max(1, len(texts))
        return {
            "samples": len(texts),
            "valid": sum(sudoku.is_grid(text, self.side) for text in texts) / count,
            "distinct": len(set(texts)) / count,
        }

    def verdict(self, text):
        return "A valid grid" if sudoku.is_grid(text, self.side) else "No valid grid"

    def puzzles(self, n):
        found, random = [], generator("sudoku", "puzzles", self.side)
        for text in cycle(self.held_out(0)):
            if len(found) == n:
                return found
            cells, side = sudoku.parse(text)
            puzzle = sudoku.dig(cells, side, CLUES[side], random)
            if puzzle:
                found.append((sudoku.to_text(puzzle, side), text))


class Sudoku9(Sudoku):
    """Grids of 9 x 9, which take some 20 ms each to draw. Training has POOL of them with their
    digits, rows, columns, bands and stacks exchanged, which is a law of at most 34.8 nats; the
    held-out ones are drawn by themselves (that one of them is an exchanged one of the pool has a
    probability of 5e-5)."""

    POOL, HELD_OUT = 1024, 256

    def __init__(self):
        super().__init__(9)

    def generate(self, seed, n):
        return texts_of(sudoku.varied(drawn("pool", self.POOL), n, generator("sudoku", seed)))

    def training(self, seed, step, n):
        return self.generate(f"train {seed} {step}", n)

    def held_out(self, seed):
        return texts_of(drawn("held out", self.HELD_OUT))


@functools.cache
def drawn(name, n):
    """n grids of 9 x 9, (n, 9, 9), the same for the same name, beside a progress bar."""
    random, hidden = generator("sudoku", name), None if is_first() else True
    bar = tqdm(range(n), desc="drawing grids", leave=False, disable=hidden)
    return torch.cat([sudoku.grids(9, 1, random) for _ in bar])


def texts_of(grids):
    """Texts (list of str) of grids (n, side, side)."""
    return [sudoku.to_text(grid, grids.size(1)) for grid in grids.flatten(1).tolist()]


BUILT_IN = {"tales": Tales(), "sudoku4": Sudoku(4), "sudoku6": Sudoku(6), "sudoku9": Sudoku9()}
