"""The largest number of fillings of the last four boxes of a 9 x 9 Sudoku, given the others: the
bounds of utils/sudoku.py, in some three minutes.

    python scripts/lab/sudoku_fillings.py

Three disjoint triples of digits are a partition. The fillings depend on those of the columns of B2
and B3 and of the rows of B4 and B7 (in no order: columns within a box may be exchanged). Exchanging
digits everywhere changes nothing, so the first two are taken up to that, and the other two up to
the exchanges that leave the first two as they are, or exchange them.
"""

import itertools
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import torch

from utils import sudoku

SETS_OF_THREE = [
    sum(1 << digit for digit in triple) for triple in itertools.combinations(range(9), 3)
]  # as bits
PARTITIONS = [
    sorted(three)
    for three in itertools.combinations(SETS_OF_THREE, 3)
    if three[0] | three[1] | three[2] == sudoku.ALL_DIGITS
]  # 280
NUMBER = {tuple(partition): number for number, partition in enumerate(PARTITIONS)}


def images():
    """Number of each partition after each exchange of digits: (9!, 280), int16."""
    exchanges = torch.tensor(list(itertools.permutations(range(9))))
    index = torch.full((512**2,), -1, dtype=torch.int16)
    for (one, two, _), number in NUMBER.items():
        index[one * 512 + two] = number
    found = []
    for partition in PARTITIONS:
        members = [[digit for digit in range(9) if bits >> digit & 1] for bits in partition]
        moved = torch.stack([(1 << exchanges[:, three]).sum(1) for three in members], 1)
        one, two, _ = moved.sort(1).values.T
        found.append(index[one * 512 + two])
    return torch.stack(found, 1)


def main():
    moved, count = images(), len(PARTITIONS)
    bits = torch.tensor(PARTITIONS)
    pair = lambda rows, a, b: rows[:, a].long() * count + rows[:, b].long()
    classes = torch.minimum(  # the least pair that (0, q) becomes by an exchange, or turned over
        *(
            torch.stack([pair(moved, *ends(q)).min() for q in range(count)])
            for ends in (lambda q: (0, q), lambda q: (q, 0))
        )
    )
    most = {True: 0, False: 0}  # by whether columns and rows are both alike
    for q in sorted({int((classes == one).nonzero()[0]) for one in classes.unique()}):
        keeps = (moved[:, 0] == 0) & (moved[:, q] == q) | (moved[:, 0] == q) & (moved[:, q] == 0)
        seen, by, kinds = torch.zeros(count, count, dtype=torch.bool), moved[keeps].long(), 0
        for a, b in itertools.product(range(count), repeat=2):
            if not seen[a, b]:
                seen[by[:, a], by[:, b]] = seen[by[:, b], by[:, a]] = True
                found = int(sudoku.fillings(bits[[0, q]], bits[[a, b]])[0][-1])
                # columns and rows may change places, so that those of columns alone count for both
                alike = q == 0 and a == b
                if q or alike:
                    most[alike] = max(most[alike], found)
                kinds += 1
        print(f"columns of kind {q}: {kinds:,} kinds of rows", flush=True)
    print(f"at most {most[False]:,} fillings, {most[True]:,} where columns and rows are alike")
    assert most == {True: sudoku.MOST_FILLINGS, False: sudoku.MOST_UNLESS_ALIKE}


if __name__ == "__main__":
    main()
