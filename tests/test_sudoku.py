"""Sudoku, the built-in corpus of grids: drawn uniformly, puzzles with one solution, and a model of
them."""

import collections
import functools
import itertools
import json
import math
import os

import pytest
import torch
from conftest import TINY, load, run

import inference
import train
from scripts.lab import ablate, compare_puzzles, compare_training, variants
from utils import built_in, canvas, corpus, runtime, samples, sudoku, texts
from utils import tokenizer as tokenizers
from utils.built_in import BUILT_IN

# 17 clues, one solution
FEW_CLUES = "...8.1..........435............7.8........1...2..3....6......75..34........2..6.."


@functools.cache
def every_grid_of_4():
    """All of them, row by row."""
    found = [()]
    for number in range(4):
        found = [
            (*rows, row)
            for rows in found
            for row in itertools.permutations(range(4))
            if not any(a == b for other in rows for a, b in zip(row, other))
            and (number % 2 == 0 or not set(row[:2]) & set(rows[-1][:2]))
        ]
    return [sum(rows, ()) for rows in found]


def generator(name):
    return runtime.generator("test", name)


def test_the_tables_have_all_grids():
    """Each stands for so many: its digits and the columns of the right stack are exchanged."""
    for side in (4, 6):
        width = sudoku.BOXES[side][1]
        each = math.factorial(side) * math.factorial(width)
        table = sudoku._ordered_grids(side)
        assert len(table) * each == sudoku.COUNTS[side]
        assert len(torch.unique(table, dim=0)) == len(table)
    assert len(set(every_grid_of_4())) == sudoku.COUNTS[4]
    assert [round(sudoku.entropy(side), 3) for side in (4, 6, 9)] == [5.663, 17.155, 50.252]


def chi_square(values, categories):
    """(chi-square - degrees of freedom) in standard deviations of values, each equally likely."""
    found = collections.Counter(values)
    counts = torch.tensor([found[one] for one in categories]).double()
    assert counts.sum() == len(values)
    expected, free = len(values) / len(counts), len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum().item() - free) / math.sqrt(2 * free)


def test_grids_of_4_are_drawn_uniformly():
    grids = sudoku.grids(4, 20_000, generator("uniform")).flatten(1).tolist()
    assert abs(chi_square(list(map(tuple, grids)), sorted(every_grid_of_4()))) < 4
    varied = sudoku.varied(sudoku.grids(4, 500, generator("some")), 20_000, generator("varied"))
    assert set(map(tuple, varied.flatten(1).tolist())) <= set(every_grid_of_4())


@pytest.mark.parametrize("side", sudoku.BOXES)
def test_grids_are_grids(side):
    grids = sudoku.grids(side, 10, generator("some"))
    more = sudoku.varied(grids, 50, generator("more"))
    for cells in [*grids.flatten(1).tolist(), *more.flatten(1).tolist()]:
        assert sudoku.is_grid(sudoku.to_text(cells, side), side)
    assert len(torch.unique(more, dim=0)) > (20 if side == 4 else 49)
    assert torch.equal(grids, sudoku.grids(side, 10, generator("some")))


def test_grids_of_9_have_their_number():
    """The fillings of four boxes, given the others, are counted: their mean times the number of the
    others is that of all grids. And a filling is drawn by its index, each once."""
    random, counts = generator("nine"), []
    for _ in range(40):
        b2, b3 = sudoku._beside(random)
        b4, b7 = (box.T for box in sudoku._beside(random, stack=True))
        columns = [sudoku._bits(box, 0) for box in (b2, b3)]
        rows = [sudoku._bits(box, 1) for box in (b4, b7)]
        counts.append(int(sudoku.fillings(columns, rows)[0][-1]))
    counts = torch.tensor(counts).double()
    expected = sudoku.COUNTS[9] / math.factorial(9) / (56 * 6**6) ** 2
    error = counts.std().item() / math.sqrt(len(counts))
    assert abs(counts.mean().item() - expected) < 4 * error < 0.1 * expected
    assert counts.max() <= sudoku.MOST_UNLESS_ALIKE
    last = int(counts[-1])
    drawn = [sudoku._filling(columns, rows, index) for index in range(0, last, 50)]
    assert len({str(boxes) for boxes in drawn}) == len(drawn)
    assert sudoku._filling(columns, rows, last - 1) and not sudoku._filling(columns, rows, last)


def test_a_band_and_a_stack_are_kept_in_proportion_to_their_fillings(monkeypatch):
    """Of two that are proposed alike, one has MOST_FILLINGS."""
    assert len(sudoku._row_sets()) == 56
    same = torch.tensor([[0, 3, 6], [1, 4, 7], [2, 5, 8]])
    bits = sudoku._bits(same, 0)
    assert int(sudoku.fillings([bits, bits], [bits, bits])[0][-1]) == sudoku.MOST_FILLINGS
    numbers = {True: sudoku.MOST_FILLINGS, False: 2000}
    random, boxes = generator("two"), torch.zeros(2, 3, 3).long()
    boxes[1] = torch.arange(9).view(3, 3)
    proposed = lambda random, stack=False: (same, same) if chosen() else (same, same.T)
    state = {}

    def chosen():  # the same for a band and its stack
        if state.setdefault("left", 0) == 0:
            state.update(left=2, kind=bool(torch.rand((), generator=random) < 0.5))
        state["left"] -= 1
        return state["kind"]

    def filling(columns, rows, index):
        return (same,) * 4 if index < numbers[state["kind"]] else None

    monkeypatch.setattr(sudoku, "_beside", proposed)
    monkeypatch.setattr(sudoku, "_filling", filling)
    kinds = []
    for _ in range(400):
        sudoku._ordered_9(random)
        kinds.append(state["kind"])
    share = sudoku.MOST_FILLINGS / (sudoku.MOST_FILLINGS + 2000)
    assert abs(sum(kinds) / 400 - share) < 4 * math.sqrt(share * (1 - share) / 400)


def test_a_grid_reads_as_it_is_written():
    text = "1.3.\n.4..\n....\n..21\n"
    cells, side = sudoku.parse(text)
    assert side == 4 and cells[:4] == [0, None, 2, None] and sudoku.to_text(cells, 4) == text
    assert sudoku.parse("1.3. .4.. .... ..21") == (cells, 4)
    for wrong, message in (("123", "3 cells"), ("12345" + "." * 11, "'5' in it"), ("", "0 cells")):
        with pytest.raises(ValueError, match=message):
            sudoku.parse(wrong)
    good = "1234\n3412\n2143\n4321\n"
    assert sudoku.is_grid(good, 4) and not sudoku.is_grid(good.replace("\n", " "), 4)
    for wrong in (good[:-1], good.replace("4321", "4312"), good.replace("1", "."), "", good * 2):
        assert not sudoku.is_grid(wrong, 4)


def test_the_solver_finds_all_solutions():
    every = sorted(every_grid_of_4())
    for puzzle in (every[7][:4] + (None,) * 12, (None,) * 16, (0, 1) + (None,) * 13 + (2,)):
        fits = [g for g in every if all(a in (None, b) for a, b in zip(puzzle, g))]
        found = sudoku.solve(list(puzzle), 4, limit=1000)
        assert sorted(map(tuple, found.grids)) == fits
        assert len(sudoku.solve(list(puzzle), 4).grids) == min(2, len(fits))
    assert sudoku.solve([0, 0] + [None] * 14, 4).grids == []
    puzzle, side = sudoku.parse(FEW_CLUES)
    found = sudoku.solve(puzzle, side)
    [grid] = found.grids
    assert sudoku.is_grid(sudoku.to_text(grid, 9), 9) and found.guesses > 0
    assert all(a in (None, b) for a, b in zip(puzzle, grid))


def test_puzzles_have_one_solution_and_are_of_held_out_grids():
    for side in (4, 6):
        made = BUILT_IN[f"sudoku{side}"]
        for text, solution in made.puzzles(20):
            puzzle, _ = sudoku.parse(text)
            [grid] = sudoku.solve(puzzle, side, limit=3).grids
            assert sudoku.to_text(grid, side) == solution and texts.is_held_out(solution)
            assert side * side - puzzle.count(None) == built_in.CLUES[side]
    easy = sudoku.solve(sudoku.parse("1.3. 34.2 2.43 4.2.")[0], 4)
    assert easy.guesses == 0 and len(easy.grids) == 1


def test_puzzles_of_a_number_of_clues_and_a_difficulty():
    made = BUILT_IN["sudoku6"]
    for text, _ in made.puzzles(5, clues=15) + made.puzzles(5, clues=10, guesses=1):
        puzzle, side = sudoku.parse(text)
        found = sudoku.solve(puzzle, side)
        assert 36 - puzzle.count(None) == (15 if found.guesses == 0 else 10)
        assert found.guesses >= (36 - puzzle.count(None) == 10)
        # in which it was filled: the clues, then each cell once
        assert sorted(found.order) == list(range(36))
        assert all(puzzle[cell] is None for cell in found.order[-puzzle.count(None) :])


@pytest.mark.parametrize("name", ("sudoku4_asked", "sudoku6_asked", "sudoku6_solver"))
def test_puzzles_and_their_grids_as_pairs(name, monkeypatch):
    """The answer is the one grid, in reading order or in a solver's; training has other grids than
    are held out."""
    monkeypatch.setattr(built_in.SudokuAsked, "POOL", 9)
    monkeypatch.setattr(built_in.SudokuAsked, "HELD_OUT", 5)
    built_in.dug.cache_clear()
    made = BUILT_IN[name]
    made.held_out.cache_clear()
    seen, held_out = made.training(1, 0, 40), made.held_out(1)
    assert seen == made.training(1, 0, 40) and len({pair.question for pair in seen}) == 40
    for pairs, whether in ((seen, False), (held_out, True)):
        for pair in pairs:
            puzzle, side = sudoku.parse(pair.question)
            [grid] = sudoku.solve(puzzle, side, limit=3).grids
            text = sudoku.to_text(grid, side)
            assert made.filled(pair.question, pair.completion) == text
            assert texts.is_held_out(text) == whether and made.log_prob(pair) == 0
    wrong = pair._replace(completion=pair.completion.replace("2", "1"))
    assert made.log_prob(wrong) == -math.inf and made.figures([pair, wrong])["valid"] == 0.5
    if name.endswith("solver"):
        cells = [pair.completion[i : i + 3] for i in range(0, len(pair.completion), 3)]
        assert len({cell[:2] for cell in cells}) == pair.question.count(sudoku.HOLE)
        assert made.filled(pair.question, "zz1a91xxxb") == pair.question
    built_in.dug.cache_clear()
    made.held_out.cache_clear()


@pytest.mark.parametrize("objective", ("masked", "ar"))
def test_a_model_of_pairs_is_asked_a_puzzle(objective, monkeypatch, capsys):
    monkeypatch.setattr(built_in.SudokuAsked, "POOL", 9)
    monkeypatch.setattr(built_in.SudokuAsked, "HELD_OUT", 5)
    words = "sudoku4 --data sudoku4_asked --rows pair --short_rows 0 --seq_len 44".split()
    words += [*TINY, "--final_samples", "2", "--objective", objective]
    code, out, err = run(train.main, words, monkeypatch, capsys)
    assert code == 0 and "puzzles_solved" in out, err
    puzzle = "1.3. .4.. .... ..21"
    code, out, err = run(inference.main, ["--puzzle", puzzle, "--json"], monkeypatch, capsys)
    assert code == 0 and "".join(json.loads(out)["tokens"]).startswith("1.3.\n.4..\n"), err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny run on grids of 4 x 4."""
    folder = tmp_path_factory.mktemp("grids")
    words = ["sudoku", *TINY, "--data", "sudoku4", "--seq_len", "21", "--final_samples", "4"]
    cfg, _ = load([*words, "--name", "four", "--out_dir", str(folder)])
    train.train(cfg, quiet=True)
    return folder


def test_training_never_sees_held_out_grids():
    cfg, _ = load(["sudoku", "--device", "cpu"])
    data = corpus.load(cfg)
    assert cfg.data == "sudoku6" and data.held_out.shape[1] == 43
    assert all(texts.is_held_out(data.tokenizer.decode(row)) for row in data.held_out.tolist())
    seen = [data.tokenizer.decode(row) for step in range(3) for row in data.batch(step).tolist()]
    assert len(set(seen)) == len(seen) and not any(map(texts.is_held_out, seen))
    assert all(BUILT_IN["sudoku6"].log_prob(text) > -math.inf for text in seen)
    assert torch.equal(data.batch(2, slice(3, 9)), data.batch(2)[3:9])


def test_grids_of_9_train_on_others_than_are_held_out(monkeypatch):
    """The former are variations of a pool."""
    monkeypatch.setattr(built_in.Sudoku9, "POOL", 3)
    monkeypatch.setattr(built_in.Sudoku9, "HELD_OUT", 2)
    made = BUILT_IN["sudoku9"]
    seen, held_out = made.training(1, 0, 20) + made.training(1, 1, 20), made.held_out(1)
    assert len(set(seen)) == 40 and len(set(held_out)) == 2 and not set(seen) & set(held_out)
    assert all(made.log_prob(text) == -made.entropy() for text in seen + held_out)
    assert made.training(1, 0, 20) == seen[:20] and made.held_out(2) == held_out
    [(puzzle, solution)] = made.puzzles(1)
    assert solution in held_out and puzzle.count(sudoku.HOLE) == 81 - built_in.CLUES[9]


def test_cells_are_characters(monkeypatch, capsys):
    """A BPE would join them; one that lies ready for the user's own text is left alone."""
    os.makedirs("artifacts/tokenizer")
    tokenizers.save(tokenizers.train_bpe(["one two"] * 9, 258), tokenizers.DEFAULT)
    cfg, _ = load(["--data", "sudoku4", "--device", "cpu"])
    assert cfg.tokenizer == "char" and cfg.seq_len == 21 and cfg.name == "sudoku4"
    code, _, err = run(train.main, "sudoku --tokenizer bpe --device cpu", monkeypatch, capsys)
    assert code == 2 and "its cells are characters; use --tokenizer char" in err
    code, _, err = run(train.main, "sudoku --seq_len 42 --device cpu", monkeypatch, capsys)
    assert code == 2 and "shorter than a grid" in err and "at least 43" in err


def test_the_metrics_of_grids(folder):
    report = json.load(open(folder / "logs" / "four.json"))
    assert report["exact_nats_per_grid"] == pytest.approx(math.log(288))
    assert report["bound_nats_per_grid"] > report["exact_nats_per_grid"]
    assert report["puzzles"] == 4 and 0 <= report["puzzles_solved"] <= 1
    assert 1 <= report["nfe_a_puzzle"] <= 11 and "valid" in report["samples"]


@pytest.mark.parametrize(
    "words", ("--block_len 5", "--objective ar", "--objective uniform", "--final_samples 0")
)
def test_the_metrics_of_other_families(words):
    """Only those that fill holes are given puzzles, and if there are samples at all."""
    more = "--data sudoku4 --seq_len 21 --final_samples 2 --device cpu".split()
    report = train.train(load(["sudoku", *TINY, *more, *words.split()])[0], quiet=True)
    assert report["bound_nats_per_grid"] > 0
    assert ("puzzles_solved" in report) == ("uniform" in words)


def test_a_puzzle_is_filled_in(folder, monkeypatch, capsys):
    path = ["--checkpoint", str(folder / "models" / "four.best.pt"), "--device", "cpu"]
    puzzle = "1.3. .4.. .... ..21"
    code, out, err = run(inference.main, [*path, "--puzzle", puzzle, "--json"], monkeypatch, capsys)
    _, *tokens = json.loads(out)["tokens"]  # after the end that stands before
    assert code == 0 and len(tokens) == 20, err
    asked = "".join(f"{row}\n" for row in puzzle.split())
    assert all(sign in (token, ".") for sign, token in zip(asked, tokens, strict=True))
    for more, message in (
        (["--puzzle", "123"], "--puzzle has 3 cells"),
        (["--puzzle", "." * 36], "--puzzle is of 6 x 6, and this model was trained on sudoku4"),
        (["--puzzle", "1234341221434321"], "has no hole"),
        (["--puzzle", "11" + "." * 14], "has no solution"),
        (["--puzzle", "." * 16, "--prompt", "1"], "leave out --prompt"),
        (["--puzzle", "." * 16, "--infill", "[1]"], "give one of them"),
    ):
        code, _, err = run(inference.main, [*path, *more], monkeypatch, capsys)
        assert code == 2 and message in err, (more, err)


def test_a_perfect_model_solves_every_puzzle(folder):
    """With a network that knows the solution all are solved; the same holes filled otherwise
    are not."""
    model = inference.load(str(folder / "models" / "four.best.pt"), device="cpu")
    puzzles, tokenizer = BUILT_IN["sudoku4"].puzzles(3), model.tokenizer
    rows = torch.tensor([canvas.build(tokenizer, [text], 0) for _, text in puzzles])
    for shift, share in ((0, 1.0), (1, 0.0)):
        known = (rows + shift) % 4 if shift else rows

        class Oracle(torch.nn.Module):
            vocab_size = tokenizer.vocab_size

            def forward(self, ids, ratio, select=None, **_):
                logits = torch.nn.functional.one_hot(known, self.vocab_size - 1).float() * 50
                return logits if select is None else logits.flatten(0, 1)[select]

        how = model.settings(temperature=0.0)
        found = samples.solve_puzzles(
            Oracle(), model.family, tokenizer, puzzles, torch.device("cpu"), how
        )
        assert found["puzzles_solved"] == share and found["puzzles"] == 3


def test_samplers_solve_puzzles_that_are_counted(folder, monkeypatch, capsys):
    settings = compare_puzzles.puzzle_settings
    few = lambda options: [one for one in settings(options) if one["sampler"] == "margin"][:1]
    monkeypatch.setitem(
        ablate.COMPARISONS, "puzzles", ablate.COMPARISONS["puzzles"]._replace(settings=few)
    )
    words = "puzzles --num_samples 5 --device cpu --out_dir out --checkpoint"
    path = str(folder / "models" / "four.best.pt")
    code, _, err = run(ablate.main, [*words.split(), path], monkeypatch, capsys)
    [row] = ablate.read_table("out/puzzles.csv")
    assert code == 0 and row["nfe"] == "2" and 0 <= float(row["solved"]) <= 1, err
    assert os.path.getsize("out/puzzles.png") > 10_000
    assert len(settings(None)) > 40


def test_puzzles_are_counted_by_difficulty(folder, monkeypatch, capsys):
    every = compare_puzzles.difficulty_settings(None)
    assert {(one["clues"], one["guesses"]) for one in every} >= {(8, 0), (10, 1)}
    few = [one | {"clues": clues} for one, clues in zip(every, (8, 8, 6, 6))]
    compared = ablate.COMPARISONS["puzzle_difficulty"]._replace(settings=lambda options: few)
    monkeypatch.setitem(ablate.COMPARISONS, "puzzle_difficulty", compared)
    words = "puzzle_difficulty --num_samples 3 --device cpu --out_dir out --checkpoint"
    path = str(folder / "models" / "four.best.pt")
    code, _, err = run(ablate.main, [*words.split(), path], monkeypatch, capsys)
    rows = ablate.read_table("out/puzzle_difficulty.csv")
    assert code == 0 and [row["nfe"] for row in rows] == ["8", "8", "10", "10"], err
    assert os.path.getsize("out/puzzle_difficulty.png") > 10_000


def test_families_solve_puzzles_that_are_counted(monkeypatch, capsys):
    """Each is trained once, and judged with each of its samplers; the bound is of all."""
    monkeypatch.setattr(built_in.SudokuAsked, "POOL", 9)
    monkeypatch.setattr(built_in.SudokuAsked, "HELD_OUT", 5)
    shape = dict(n_layer=1, n_head=2, n_embd=16, batch_size=4, final_rows=4)
    changed = lambda options: base(options) | shape
    base = variants.base_config
    monkeypatch.setattr(variants, "base_config", changed)
    trained, run_variant = [], compare_training.run_variant
    counted = lambda cfg, *rest: trained.append(cfg.data) or run_variant(cfg, *rest)
    monkeypatch.setattr(compare_training, "run_variant", counted)
    words = "puzzle_families --base sudoku --iters 2 --num_samples 2 --device cpu --out_dir out"
    code, _, err = run(ablate.main, words, monkeypatch, capsys)
    rows = ablate.read_table("out/puzzle_families_sudoku.csv")
    assert code == 0 and trained == ["sudoku6"] * 4 + ["sudoku6_asked"] * 3 + ["sudoku6_solver"]
    assert all(float(row["bound"]) > 0 for row in rows), err
    assert {row["variant"] for row in rows if not row["solved"]} == {"autoregressive"}
    assert {row["sampler"] for row in rows if row["variant"] == "masked"} == set(
        compare_puzzles.MASKED
    )
    assert os.path.getsize("out/puzzle_families_sudoku.png") > 10_000
    words = "puzzle_families --iters 2 --device cpu --out_dir out"
    code, _, err = run(ablate.main, words, monkeypatch, capsys)
    assert code == 2 and "give --base sudoku" in err
