"""The tables about real text: see tables.py."""

import re

from scripts.lab.results import load, runs, source, table


def bits_a_byte(report):
    """The bound with its standard errors over rows and over masks."""
    bits = report["bound_bits_per_byte"]
    masks = report["bound_se_masks"] * bits / report["bound_nats_per_token"]
    return f"{bits:.4f} (± {report['bound_bits_per_byte_se_rows']:.4f}, ± {masks:.4f})"


HOUR = {
    "published recipe": "hour_published",
    "masked": "hour_masked",
    "blocks of 4": "hour_blocks_4",
    "autoregressive": "hour_ar",
    "autoregressive, float32": "stories_judge",
    "blocks of 4, three minutes": "three_minutes",
}


def beside(file):
    """A function from a report to how many more bits a byte it has than the report in the file."""
    theirs = load(file)["bound_bits_per_byte"]
    return lambda r: f"{r['bound_bits_per_byte'] / theirs - 1:+.1%}"


TRAINED = {  # what a run of training says of itself
    "parameters": lambda r: f"{r['parameters']:,}",
    "steps": lambda r: f"{r['steps']:,}",
    "of the best checkpoint": lambda r: f"{r['best_step']:,}",
    "ms a step": lambda r: f"{1000 * r['seconds_a_step']:,.0f}",
    "minutes": lambda r: f"{r['minutes']:.1f}",
    "passes over the text": lambda r: f"{r['passes_over_the_text']:.1f}",
    "NELBO, bits a byte (± s.e. over rows, over masks)": bits_a_byte,
}


def benchmarks(names):
    """{label: the result file} of {label: its name}."""
    return {label: f"benchmarks/{name}.json" for label, name in names.items()}


def hour():
    """What is learned of stories in an hour: by the published recipe, and by ours."""
    files = benchmarks(HOUR)
    others = {
        f"beside the {label}": beside(files[label])
        for label in ("published recipe", "autoregressive", "autoregressive, float32")
    }
    return runs(files, TRAINED | others)


LONGER = {
    "an hour": "hour_blocks_4",
    "1,500 steps, float32": "hour_float32",
    "4,000 steps, float32": "hours_float32",
    "12,500 steps, dropout 0.2": "hours_dropout",
}
WRITES = {  # what the samples of a run are like
    "unigram entropy, nats": ("unigram_entropy", ".2f"),
    "longest copy of training text, tokens": ("longest_copy_mean", ".1f"),
    "shared runs of 8 tokens": ("shared_8_grams", ".1%"),
    "overlap of samples": ("self_overlap", ".1%"),
}


def longer():
    """What more time, or a third of it without bfloat16, gives the preset."""
    files = benchmarks(LONGER)
    of = lambda name, form: lambda r: f"{r['samples'][name]:{form}} ({r['reference'][name]:{form}})"
    writes = {
        f"{label} (of held-out text)": of(name, form) for label, (name, form) in WRITES.items()
    }
    what = {label: line for label, line in TRAINED.items() if label != "ms a step"}
    return runs(files, what | {"beside an hour": beside(files["an hour"])} | writes)


WIKITEXT = [f"benchmarks/wikitext2_{part}.json" for part in ("train", "valid", "test")]
GLUON_NLP = (
    "https://github.com/dmlc/gluon-nlp/blob/254e68c743e7f1b22b3e4729a0eb566ad35fc061/scripts/"
    "language_model/word_language_model.rst"
)
LITERATURE = (  # network, source, million parameters, valid and test perplexity a word
    ("LSTM, 2 layers of 200", f"[GluonNLP]({GLUON_NLP})", "7.3", "108.25", "102.26"),
    ("AWD-LSTM, 3 layers of 600", f"[GluonNLP]({GLUON_NLP})", "–", "84.61", "80.96"),
    (
        "AWD-LSTM, 3 layers of 1,150, without cache",
        "[arXiv:1708.02182](https://arxiv.org/abs/1708.02182)",
        "33",
        "68.6",
        "65.8",
    ),
)


def wikitext():
    """The bound of the small preset on WikiText-2 a word, beside perplexities of the literature."""
    trained, *judged = WIKITEXT

    def perplexity(report):  # with its standard error over masks
        bound = report["perplexity_of_bound_per_word"]
        relative = report["bound_se_masks"] / report["bound_nats_per_token"]
        return f"{bound:.1f} (± {bound * report['bound_nats_per_word'] * relative:.1f})"

    millions = f"{load(trained)['parameters'] / 1e6:.1f}"
    ours = ("`stories_small`, blocks of 4: a bound (± s.e. over masks)", "this page", millions)
    rows = [(*ours, *map(perplexity, map(load, judged))), *LITERATURE]
    head = ["network", "source", "million parameters", "perplexity a word: valid", "test"]
    return table(head, rows) + source(*WIKITEXT)


WRITTEN = (
    "hour_published",
    "hour_masked",
    "hour_blocks_4",
    "hour_ar",
    "hours_dropout",
    "stories_small",
)


def written():
    """Ten texts of each network, as they were printed, behind lines that open."""
    lines = []
    for name in WRITTEN:
        file = f"samples/{name}.txt"
        lines += ["", f"<details><summary>{name}</summary>", ""]
        for text in re.split(r"^--- seed (?=\d+$)", load(file), flags=re.M)[1:]:
            seed, _, story = text.partition("\n")
            lines += [f"* seed {seed}: " + " ".join(story.split())]
        lines += ["", "</details>", *source(file)]
    return lines[1:]


NONE = (None, "", "0")  # cells of a setting that is not used


def sampler_name(row):
    """The sampler of a row with its steps and blocks."""
    number = lambda name, words: f", {words} {row[name]}" if row.get(name) not in NONE else ""
    return f"`{row['sampler']}`{number('steps', 'steps')}{number('decode_block', 'blocks of')}"


def maybe(name, form):
    """A column whose cells may be empty."""
    return lambda row: format(float(row[name]), form) if row.get(name) else "–"


STORIES = {  # what samples of a model of stories are like, beside held-out ones
    "": sampler_name,
    "temperature": maybe("temperature", "g"),
    "top-p": maybe("top_p", "g"),
    "NFE": maybe("nfe", ".0f"),
    "s a sample, in batches": maybe("seconds_a_sample", ".2f"),
    "judge, nats a character": maybe("judge_nats_per_character", ".3f"),
    "± s.e. over texts": maybe("judge_se_texts", ".3f"),
    "unigram entropy, nats": maybe("unigram_entropy", ".2f"),
    "repetition": maybe("repetition", ".1%"),
    "overlap": maybe("self_overlap", ".1%"),
    "longest copy, tokens": maybe("longest_copy", ".1f"),
    "known words": maybe("known_words", ".1%"),
    "ended": maybe("ended", ".0%"),
    "names stay": maybe("names_stay", ".0%"),
    "pronouns agree": maybe("pronouns_agree", ".0%"),
}
LIMITS = (16, 32, 64, 128, 256)  # NFE


def likeliest(rows, limit):
    """The setting with the lowest NLL among those of at most so many NFE: NLL, its standard error,
    entropy and sampler."""
    # means over samples, some of which end sooner or later
    found = [row for row in rows if row["nfe"] and float(row["nfe"]) <= 1.02 * limit]
    if not found:
        return "–"
    best = min(found, key=lambda row: float(row["judge_nats_per_character"]))
    return (
        f"{float(best['judge_nats_per_character']):.3f} ± {float(best['judge_se_texts']):.3f}, "
        f"{float(best['unigram_entropy']):.2f}, {sampler_name(best)}"
    )


def block_lengths():
    """What networks that differ in the length of their blocks write best at so many NFE."""
    file, groups = "ablations/block_lengths.csv", {}
    for row in load(file):
        groups.setdefault((int(row["block_len"]), row["model"].split()[1]), []).append(row)
    [real] = {
        f"{float(row['judge_nats_per_character']):.3f}, {float(row['unigram_entropy']):.2f}"
        for rows in groups.values()
        for row in rows
        if row["sampler"] == "held-out text"
    }
    name = lambda block, steps: (
        f"{'the window' if block == 256 else f'blocks of {block}'}, {int(steps):,} steps"
    )
    rows = [
        [
            name(*key),
            *(likeliest([row for row in rows if row["temperature"]], limit) for limit in LIMITS),
        ]
        for key, rows in sorted(groups.items())
    ]
    rows.append(["held-out text", real, *[""] * (len(LIMITS) - 1)])
    head = ["masks of", *(f"at most {limit} NFE" for limit in LIMITS)]
    return table(head, rows) + source(file)


LONG_STORIES = {  # what becomes of 1,000 tokens, in four parts
    "": sampler_name,
    "temperature": maybe("temperature", "g"),
    "NFE": maybe("nfe", ".0f"),
} | {
    label: lambda row, name=name, form=form: " ".join(
        format(float(row[f"{name}_{part}"]), form) for part in (1, 2, 3, 4)
    )
    for label, name, form in (
        ("judge, nats a token, by quarter", "judge", ".2f"),
        ("repeated words", "repeated", ".0%"),
        ("texts that name the first name", "first_name", ".0%"),
        ("new names", "new_names", ".1f"),
    )
}
