"""Sudoku: grids drawn uniformly, puzzles with one solution, and a solver: the built-in corpus in
which the order of writing matters.

A grid of 4 x 4, 6 x 6 or 9 x 9 has every digit once in every row, column and box. All grids are
equally likely, so the entropy is the logarithm of their number, and no model's loss can go below
it. A text has a character a cell and a line break after each row; a dot is a hole.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # side -> rows and columns of a box
# of 9 x 9: Felgenhauer and Jarvis 2005
COUNTS = {4: 288, 6: 28_200_960, 9: 6_670_903_752_021_072_936_960}
HOLE = "."


def entropy(side):
    """Exact entropy of a grid in nats (float)."""
    return math.log(COUNTS[side])


# --- grids ----------------------------------------------------------------------------------------


def grids(side, n, generator):
    """n grids (n, side, side) of digits 0 to side - 1, long, drawn independently by the
    torch.Generator, each of COUNTS[side] equally likely.

    Every grid is one whose first box is in order, with its digits exchanged: both are drawn. Below
    9 x 9 the former is one whose first row is in order too, with the columns of the right stack
    exchanged.
    """
    if side == 9:
        ordered = torch.stack([_ordered_9(generator) for _ in range(n)])
    else:
        table, width = _ordered_grids(side), BOXES[side][1]
        ordered = table[torch.randint(len(table), (n,), generator=generator)]
        columns = torch.arange(side).repeat(n, 1)
        columns[:, width:] = width + shuffled((n, width), generator)
        ordered = ordered.gather(2, columns[:, None].expand_as(ordered))
    digits = shuffled((n, side), generator)
    return digits.gather(1, ordered.flatten(1)).view(n, side, side)


def shuffled(shape, generator):
    """Random orders (..., k) long of 0 to k - 1, uniformly. In float64, where no two numbers are
    equal."""
    return torch.rand(shape, generator=generator, dtype=torch.float64).argsort(-1)


def varied(pool, n, generator):
    """n grids (n, side, side), each one of the pool (K, side, side) with its digits, and its rows
    and columns within and between boxes, exchanged at random, and turned over or not where boxes
    are square. Of a pool that was drawn uniformly, each grid by itself is uniform. A multiple of
    the side that is added to a digit, to mark its cell, stays with it."""
    side = pool.size(-1)

    def order(size):  # of the rows or columns, in groups of that size: (n, side)
        groups = shuffled((n, side // size), generator)
        within = shuffled((n, side // size, size), generator)
        return (groups[:, :, None] * size + within).flatten(1)

    found = pool[torch.randint(len(pool), (n,), generator=generator)]
    (height, width), digits = BOXES[side], shuffled((n, side), generator)
    found = found.gather(1, order(height)[:, :, None].expand_as(found))
    found = found.gather(2, order(width)[:, None].expand_as(found))
    if height == width:
        over = torch.rand(n, 1, 1, generator=generator) < 0.5
        found = torch.where(over, found.mT, found)
    marks = found // side * side
    return digits.gather(1, (found % side).flatten(1)).view_as(found) + marks


@functools.cache
def _ordered_grids(side):
    """All grids (K, side, side) of 4 x 4 or 6 x 6 whose first row and box are in order."""
    height, width = BOXES[side]
    rows = torch.tensor(list(itertools.permutations(range(side))))
    bits = 1 << rows  # (P, side)
    in_boxes = bits.view(len(rows), -1, width).sum(2)  # (P, boxes), sets of digits as bits
    found = torch.zeros(1, 0, side, dtype=torch.long)
    columns, boxes = torch.zeros(1, side, dtype=torch.long), torch.zeros(1, side // width).long()
    for number in range(side):
        fit = torch.ones(len(rows), dtype=torch.bool)
        if number < height:
            given = side if number == 0 else width
            fit = (rows[:, :given] == torch.arange(given) + number * width).all(1)
        elif number % height == 0:
            boxes = torch.zeros_like(boxes)
        parts = [
            ((c[:, None] & bits) == 0).all(2) & ((b[:, None] & in_boxes) == 0).all(2) & fit
            for c, b in zip(columns.split(1024), boxes.split(1024))
        ]
        before, row = torch.cat(parts).nonzero().T
        found = torch.cat([found[before], rows[row, None]], 1)
        columns, boxes = columns[before] | bits[row], boxes[before] | in_boxes[row]
    return found


# A grid of 9 x 9 is drawn by rejection. The top band and the left stack, given their common box,
# are drawn uniformly; then the four boxes that are left have N fillings, on average 2,693. It is
# kept with probability N / MOST_FILLINGS, with one of them. N depends on the digits of the columns
# of the two upper boxes and of the rows of the two left ones alone; the bounds are the maxima over
# all of those (scripts/lab/sudoku_fillings.py).
MOST_FILLINGS = 11_664
# unless B2 and B3 have the same triples in their columns, and B4 and B7 in their rows
MOST_UNLESS_ALIKE = 5_644
ALL_DIGITS = 511  # as bits


def _ordered_9(generator):
    """A grid (9, 9), long, uniformly among those whose first box is in order."""
    while True:
        b1 = torch.arange(9).view(3, 3)
        b2, b3 = _beside(generator)
        b4, b7 = (box.T for box in _beside(generator, stack=True))
        index = torch.randint(MOST_FILLINGS, (), generator=generator).item()
        columns = [_bits(box, 0) for box in (b2, b3)]
        rows = [_bits(box, 1) for box in (b4, b7)]
        alike = all(set(a.tolist()) == set(b.tolist()) for a, b in (columns, rows))
        if index >= (MOST_FILLINGS if alike else MOST_UNLESS_ALIKE):
            continue
        boxes = _filling(columns, rows, index)
        if boxes:
            b5, b6, b8, b9 = boxes
            bands = ([b1, b2, b3], [b4, b5, b6], [b7, b8, b9])
            return torch.cat([torch.cat(band, 1) for band in bands])


@functools.cache
def _row_sets():
    """The 56 ways to share the digits among the rows of the box to the right of one in order:
    (56, 2, 3, 3), the digits of its rows, and those of the rows of the third box."""
    first, found = [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}], []
    for a in itertools.combinations(range(3, 9), 3):
        for b in itertools.combinations({0, 1, 2, 6, 7, 8} - set(a), 3):
            c = set(range(9)) - set(a) - set(b)
            if not c & first[2]:
                second = [set(a), set(b), c]
                third = [set(range(9)) - one - two for one, two in zip(first, second)]
                found.append([list(map(sorted, second)), list(map(sorted, third))])
    return torch.tensor(found)


def _beside(generator, stack=False):
    """Two boxes (2, 3, 3) uniformly that make a band with one in order to their left; or, turned
    over, a stack with one in order above them."""
    ways = _row_sets()
    sets = ways[torch.randint(len(ways), (), generator=generator)]
    boxes = sets.gather(2, shuffled((2, 3, 3), generator))
    if stack:  # the rows of the box in order turned over are 036, 147, 258
        boxes = torch.tensor([0, 3, 6, 1, 4, 7, 2, 5, 8])[boxes]
    return boxes


def _bits(box, axis):
    """The digits of a box (..., 3, 3) along an axis, as bits: (..., 3)."""
    return (1 << box).sum(axis - 2)


TRIPLES = torch.tensor(list(itertools.permutations(range(9), 3)))  # (504, 3)


def _fills(rows, columns):
    """All fillings (n, 3, 3) of a box without the digits that stand in its rows (3,) or columns
    (3,) elsewhere, given as bits."""
    of_row = [TRIPLES[(((1 << TRIPLES) & (row | columns)) == 0).all(1)] for row in rows]
    a, b, c = of_row
    bits_a, bits_b, bits_c = ((1 << triples).sum(1) for triples in of_row)
    i, j = ((bits_a[:, None] & bits_b) == 0).nonzero().T
    k, last = (((bits_a[i] | bits_b[j])[:, None] & bits_c) == 0).nonzero().T
    return torch.stack([a[i[k]], b[j[k]], c[last]], 1)


def fillings(columns, rows):
    """The fillings of the four boxes B5, B6, B8, B9, given the digits of the columns of B2 and B3
    and of the rows of B4 and B7 (bits, two (3,) each): their number up to each pair of one of B5
    and one of B9, (n5 n9,) long; and what that was counted from.

    B5 and B6 have to fit in their rows, B5 and B8 in their columns; so do B8 and B9, B6 and B9. For
    a pair of B5 and B9 the fitting ones of B6 and of B8 are counted by two matrix products.
    """
    b5, b6, b8, b9 = (_fills(r, c) for r, c in itertools.product(rows, columns))
    key = lambda sets: (sets << torch.tensor([0, 9, 18])).sum(1)
    fit = lambda one, other, given, axis: (  # (n of one, n of other) bool
        key(ALL_DIGITS & ~(given | _bits(one, axis)))[:, None] == key(_bits(other, axis))
    )
    m56, m89 = fit(b5, b6, rows[0], 1), fit(b8, b9, rows[1], 1)
    m58, m69 = fit(b5, b8, columns[0], 0), fit(b6, b9, columns[1], 0)
    by_pair = (m56.float() @ m69.float()) * (m58.float() @ m89.float())  # whole numbers
    return by_pair.long().flatten().cumsum(0), (b5, b6, b8, b9), (m56, m69, m58, m89)


def _filling(columns, rows, index):
    """The filling of that index, a tuple of B5, B6, B8, B9, (3, 3) each; None: there are fewer."""
    sums, (b5, b6, b8, b9), (m56, m69, m58, m89) = fillings(columns, rows)
    if index >= sums[-1]:
        return None
    pair = int((sums <= index).sum())
    five, nine = divmod(pair, len(b9))
    sixes = (m56[five] & m69[:, nine]).nonzero()[:, 0]
    eights = (m58[five] & m89[:, nine]).nonzero()[:, 0]
    six, eight = divmod(index - (int(sums[pair - 1]) if pair else 0), len(eights))
    return b5[five], b6[sixes[six]], b8[eights[eight]], b9[nine]


# --- texts ----------------------------------------------------------------------------------------


def to_text(cells, side, hole=HOLE):
    """The text (str) of cells, side^2 digits in reading order, each an int or (a hole) None."""
    signs = [hole if digit is None else str(digit + 1) for digit in cells]
    rows = ("".join(signs[start : start + side]) for start in range(0, side * side, side))
    return "".join(f"{row}\n" for row in rows)


def parse(text):
    """(cells, a list of ints and None; side) of a text with or without line breaks. ValueError
    where it is none."""
    signs = "".join(text.split())
    side = math.isqrt(len(signs))
    if side not in BOXES or side * side != len(signs):
        sizes = ", ".join(f"{side * side} for {side} x {side}" for side in BOXES)
        raise ValueError(f"{len(signs)} cells; expected {sizes}")
    if wrong := set(signs) - set("123456789"[:side] + HOLE):
        raise ValueError(f"{min(wrong)!r} in it; expected 1 to {side}, and {HOLE!r} for a hole")
    return [None if sign == HOLE else int(sign) - 1 for sign in signs], side


def is_grid(text, side):
    """Whether a text is exactly that of a grid."""
    try:
        cells, its_side = parse(text)
    except ValueError:
        return False
    written = its_side == side and None not in cells and text == to_text(cells, side)
    return written and all(len({cells[i] for i in unit}) == side for unit in _units(side)[0])


# --- puzzles --------------------------------------------------------------------------------------


@functools.cache
def _units(side):
    """(rows, columns and boxes, each a tuple of cells; of each cell those that share one)."""
    height, width = BOXES[side]
    cell = lambda row, column: row * side + column
    units = [tuple(cell(row, column) for column in range(side)) for row in range(side)]
    units += [tuple(cell(row, column) for row in range(side)) for column in range(side)]
    units += [
        tuple(cell(top + i, left + j) for i in range(height) for j in range(width))
        for top in range(0, side, height)
        for left in range(0, side, width)
    ]
    peers = [
        tuple(sorted({i for unit in units if one in unit for i in unit} - {one}))
        for one in range(side * side)
    ]
    return units, peers


class Solved(NamedTuple):
    """What a solver finds."""

    grids: list  # of solutions, lists of digits in reading order
    guesses: int  # how often no digit followed from the others, and one was tried
    order: list  # of the cells of the first one, as they were filled, those of the puzzle first


def solve(puzzle, side, limit=2):
    """`Solved` of a puzzle (list of ints and None), with at most `limit` solutions.

    A cell is filled where one digit is left for it, or where it is the only one left for a digit in
    a row, column or box. Where there is none, each digit of a cell with the fewest is tried.
    """
    state, settled = _Search(side, limit), {}
    possible = [(1 << side) - 1] * (side * side)
    given = [cell for cell, digit in enumerate(puzzle) if digit is not None]
    if state.fill(possible, settled, [(cell, 1 << puzzle[cell]) for cell in given]):
        state.search(possible, settled)
    holes = [cell for cell in state.order if puzzle[cell] is None]
    return Solved(state.grids, state.guesses, given + holes)


class _Search:
    def __init__(self, side, limit):
        self.side, self.limit, (self.units, self.peers) = side, limit, _units(side)
        self.grids, self.guesses, self.order = [], 0, []

    def fill(self, possible, settled, todo):
        """Fill cells, (cell, bit) each, and what follows from them, in possible (a list of digits
        as bits) and settled (a dict of cells, in order); False where a cell is left without a
        digit, or a digit without a cell."""
        while todo:
            while todo:
                cell, bit = todo.pop()
                if not possible[cell] & bit:
                    return False
                if cell in settled:
                    continue
                settled[cell] = True
                possible[cell] = bit
                for peer in self.peers[cell]:
                    if possible[peer] & bit:
                        left = possible[peer] = possible[peer] & ~bit
                        if not left:
                            return False
                        if not left & (left - 1):
                            todo.append((peer, left))
            for unit in self.units:
                once = twice = 0
                for cell in unit:
                    twice |= once & possible[cell]
                    once |= possible[cell]
                if once.bit_count() != self.side:
                    return False
                for cell in unit:
                    if (bit := possible[cell] & ~twice) and cell not in settled:
                        if bit & (bit - 1):  # the only cell for two digits
                            return False
                        todo.append((cell, bit))
        return True

    def search(self, possible, settled):
        """Add the solutions of what is possible to grids."""
        if len(settled) == len(possible):
            self.order = self.order or list(settled)
            self.grids.append([bits.bit_length() - 1 for bits in possible])
            return
        open_cells = (cell for cell in range(len(possible)) if cell not in settled)
        cell = min(open_cells, key=lambda one: possible[one].bit_count())
        self.guesses += 1
        for digit in range(self.side):
            if possible[cell] >> digit & 1 and len(self.grids) < self.limit:
                branch, found = list(possible), dict(settled)
                if self.fill(branch, found, [(cell, 1 << digit)]):
                    self.search(branch, found)


def dig(grid, side, clues, generator):
    """A puzzle (list of ints and None) of a grid (list of ints) with so many digits left and one
    solution: cells are taken out in random order where they follow from the others. None where that
    ends before."""
    puzzle = list(grid)
    for cell in torch.randperm(side * side, generator=generator).tolist():
        if len(puzzle) - puzzle.count(None) == clues:
            break
        digit, puzzle[cell] = puzzle[cell], None
        if len(solve(puzzle, side).grids) > 1:
            puzzle[cell] = digit
    return puzzle if len(puzzle) - puzzle.count(None) == clues else None
