"""The corpora that are made here, and of which everything is known: which texts there are, and how
probable each is. To add one, add a class like these and an entry of BUILT_IN."""

import functools
import math
from itertools import cycle, islice

import torch
from tqdm import tqdm

from utils import pairs, requests, sudoku, tales, texts
from utils.runtime import generator, is_first

HELD_OUT = 2048  # texts


class Tales:
    """Stories of a grammar (utils/tales.py).

    noun, nouns    what a text is called, and several
    prompt         that one may begin with
    shortest       tokens of one, with any tokenizer that is trained here
    windows        how long a window has to be (str)
    of_characters  whether a token has to be a character
    pairs          whether it is of pairs of utils/pairs.py, which then stand for texts
    """

    noun, nouns, prompt, of_characters = "story", "stories", "Once upon a time", False
    shortest, windows, pairs = 60, "67 with bpe, 320 with char", False

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


class TalesAsked(Tales):
    """Stories that are asked for (utils/requests.py); `log_prob` and `entropy` are given the
    request."""

    prompt, pairs = "A story with a bear, a lost kite.", True
    windows = "97, or 113 with the bpe of tales"

    def generate(self, seed, n):
        return requests.generate(seed, n)

    def log_prob(self, pair):
        return requests.log_prob(pair)

    def entropy(self):
        return requests.entropy()

    def verdict(self, pair):
        said = super().verdict(pair.completion)
        if requests.facts_of(pair.completion) is None or not requests.named(pair.question):
            return said
        return f"{said}; {'' if requests.obeys(pair) else 'not '}what was asked for"

    def figures(self, found):
        """As of Tales; and obeying, the share of Pairs whose answer is a story with all that was
        asked for. log_prob is the mean of those, given their requests."""
        log_probs = [p for pair in found if (p := requests.log_prob(pair)) > -math.inf]
        return super().figures([pair.completion for pair in found]) | {
            "obeying": len(log_probs) / max(1, len(found)),
            "log_prob": sum(log_probs) / len(log_probs) if log_probs else None,
        }


CLUES = {4: 5, 6: 12, 9: 28}  # of puzzles, by side


class Sudoku:
    """Sudoku grids (utils/sudoku.py), all equally likely; `log_prob` and `entropy` are of that law.

    A tenth, by hash, is held out in every run: training draws from the others, so that its own law
    has an entropy that is smaller by some 0.1 nats. Of 4 x 4, some 29 grids are held out, and stand
    among the held-out texts many times. Methods: see Tales.
    """

    noun, nouns, prompt, of_characters, pairs = "grid", "grids", "", True, False

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

    def puzzles(self, n, clues=None, guesses=0):
        """clues: how many digits are left (None: CLUES); guesses: how many a solver needs at
        least."""
        found, random = [], generator("sudoku", "puzzles", self.side)
        for text in cycle(self.held_out(0)):
            if len(found) == n:
                return found
            cells, side = sudoku.parse(text)
            puzzle = sudoku.dig(cells, side, clues or CLUES[side], random)
            if puzzle and (not guesses or sudoku.solve(puzzle, side).guesses >= guesses):
                found.append((sudoku.to_text(puzzle, side), text))

    def filled(self, puzzle, answer):
        """The text of the grid that the answer to a puzzle stands for."""
        return answer


class SudokuAsked(Sudoku):
    """Pairs of a puzzle and its grid, in reading order. Training has POOL puzzles with their
    digits, rows, columns, bands and stacks exchanged."""

    POOL, HELD_OUT, noun, nouns, pairs = 2048, 256, "puzzle", "puzzles", True
    windows = "as long as a puzzle, its answer and four tokens"

    def __init__(self, side):
        super().__init__(side)
        self.grids = Sudoku(side)

    def generate(self, seed, n):
        side, random = self.side, generator("sudoku", seed)
        marked = sudoku.varied(dug(side, self.POOL), n, random).flatten(1)
        found = []
        for cells in marked.tolist():
            puzzle = [None if cell >= side else cell for cell in cells]
            found.append(self.pair(puzzle, [cell % side for cell in cells]))
        return found

    def pair(self, puzzle, grid):
        """The Pair of a puzzle and its grid, lists of cells."""
        return pairs.asked(sudoku.to_text(puzzle, self.side), self.answer(puzzle, grid))

    def answer(self, puzzle, grid):
        return sudoku.to_text(grid, self.side)

    def training(self, seed, step, n):
        found = self.generate(f"train {seed} {step}", n + n // 4 + 16)
        read = lambda pair: self.filled(pair.question, pair.completion)
        fresh = [pair for pair in found if not texts.is_held_out(read(pair))]
        return (fresh * n)[:n]

    @functools.lru_cache(maxsize=8)
    def held_out(self, seed):
        of_text = lambda text: sudoku.parse(text)[0]
        found = self.puzzles(self.HELD_OUT)
        return [self.pair(of_text(puzzle), of_text(grid)) for puzzle, grid in found]

    def puzzles(self, n, clues=None, guesses=0):
        return self.grids.puzzles(n, clues, guesses)

    def log_prob(self, pair):
        """0 for the one answer that a puzzle has."""
        return 0.0 if self.right(pair) else -math.inf

    def right(self, pair):
        """Whether the answer of a Pair is a grid with the digits of its puzzle."""
        grid = self.filled(pair.question, pair.completion)
        same = lambda one, other: other in (sudoku.HOLE, one)
        return sudoku.is_grid(grid, self.side) and all(map(same, grid, pair.question))

    def entropy(self):
        return 0.0

    def verdict(self, pair):
        return "The solution" if self.right(pair) else "Not the solution"

    def figures(self, found):
        """Shares in [0, 1]: valid, right answers; distinct, different ones."""
        count = max(1, len(found))
        return {
            "samples": len(found),
            "valid": sum(map(self.right, found)) / count,
            "distinct": len({pair.completion for pair in found}) / count,
        }


ROWS = "abcdefghi"


class SudokuSolver(SudokuAsked):
    """The same with answers in the order in which a solver fills the cells: "b35" is a 5 in the
    third column of the second row."""

    def answer(self, puzzle, grid):
        side = self.side
        holes = (cell for cell in sudoku.solve(puzzle, side).order if puzzle[cell] is None)
        return "".join(f"{ROWS[i // side]}{i % side + 1}{grid[i] + 1}" for i in holes)

    def filled(self, puzzle, answer):
        lines = [list(line) for line in puzzle.splitlines()]
        for row, column, digit in zip(answer[::3], answer[1::3], answer[2::3]):
            row, column = ROWS.find(row), int(column) if column.isdigit() else 0
            if 0 <= row < len(lines) and 0 < column <= len(lines[row]):
                lines[row][column - 1] = digit
        return "".join(f"{''.join(line)}\n" for line in lines)


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


@functools.cache
def dug(side, n):
    """n puzzles (n, side, side), the same every time, none of a held-out grid: each hole has its
    digit, and `side` more."""
    random, found = generator("sudoku", "pool", side), []
    while len(found) < n:
        grid = sudoku.grids(side, 1, random)
        cells = grid.flatten().tolist()
        puzzle = sudoku.dig(cells, side, CLUES[side], random)
        if puzzle and not texts.is_held_out(texts_of(grid)[0]):
            found.append([c + side * (p is None) for c, p in zip(cells, puzzle, strict=True)])
    return torch.tensor(found).view(n, side, side)


BUILT_IN = {
    "tales": Tales(),
    "tales_asked": TalesAsked(),
    "sudoku4": Sudoku(4),
    "sudoku6": Sudoku(6),
    "sudoku9": Sudoku9(),
    "sudoku4_asked": SudokuAsked(4),
    "sudoku6_asked": SudokuAsked(6),
    "sudoku6_solver": SudokuSolver(6),
}
