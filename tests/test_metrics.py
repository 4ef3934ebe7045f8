import dataclasses
import html
import io
import json
import logging
import math
import os
import re
import shutil
import subprocess
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from toy import settings

from config import Config, SampleConfig
from model import Transformer
from utils import (
    checkpoint,
    encoding,
    judges,
    metrics,
    plots,
    runtime,
    samples,
    tales,
    terminal,
    trace,
    video,
)
from utils import page as pages
from utils.built_in import BUILT_IN
from utils.cli import UserError
from utils.encoding import Corpus
from utils.families import family_of
from utils.settings import family_defaults
from utils.tokenizer import train_bpe, train_char


def test_real_stories_are_judged_perfect():
    stories = tales.generate(3, 200)
    report = BUILT_IN["tales"].figures(stories)
    assert (report["valid"], report["grammatical"], report["agreeing"], report["distinct"]) == (
        1,
        1,
        1,
        1,
    )
    assert report["log_prob"] == pytest.approx(-tales.entropy(), abs=0.5)
    broken = stories[0].replace(".", "!", 1)
    report = BUILT_IN["tales"].figures([stories[0], stories[0], broken, broken])
    assert (
        report["valid"] == 0.5
        and report["distinct"] == 0.5
        and report["grammatical"] == pytest.approx(0.9)
    )


def test_longest_copies():
    training = torch.randint(50, (200, 30), generator=runtime.generator(1))
    rows = 100 + torch.arange(90).view(3, 30)
    rows[0, 5:17] = training[7, 3:15]
    rows[1] = training[9]
    assert samples.longest_copies(rows, training).tolist() == [12, 30, 0]


def test_bits_of_a_network_that_knows_nothing():
    """ln V nats per token, and from it log2 V bits a character for a character model."""
    chars = train_char(["abcdefgh"], documents=False)
    cfg = settings(
        n_layer=1,
        n_head=1,
        n_embd=8,
        init="zero",
        tie_embeddings=False,
        final_rows=4,
        final_masks=2,
        data="x",
        seq_len=16,
    )
    rows = torch.randint(8, (6, 16))
    data = encoding.Corpus(None, rows, chars, 0, "", None)
    report = metrics.held_out(
        Transformer(cfg, chars.vocab_size), family_of(cfg), data, torch.device("cpu")
    )
    assert report["bound_nats_per_token"] == pytest.approx(math.log(8), abs=1e-5)
    assert (
        report["bound_bits_per_character"]
        == report["bound_bits_per_byte"]
        == pytest.approx(3, abs=1e-5)
    )
    assert report["bound_bits_per_byte_se_rows"] == pytest.approx(0, abs=1e-5)
    assert report["held_out_rows"] == 4 and "exact_nats_per_story" not in report


def test_bytes_and_characters_differ():
    chars = train_char(["é漢a"], documents=False)
    rows = torch.tensor(chars.encode(["é漢a"]))
    assert encoding.row_lengths(rows, chars).tolist() == [[3, 6]]


def test_loss_curves(tmp_path):
    log = tmp_path / "run.jsonl"
    log.write_text(
        "\n".join(
            json.dumps({"step": s, "loss": 1 / s, "bound": 2 / s, "bound_se_rows": 0.1})
            for s in (1, 2, 3)
        )
    )
    plots.loss_curves([str(log)], str(tmp_path / "new" / "x.png"))
    assert (tmp_path / "new" / "x.png").read_bytes()[:4] == b"\x89PNG"


# --- traces ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(tales.generate(1, 300), 600)


def frame(
    ids, fresh=(), remasked=(), nfe=1, confidence=1.0, top=None, noisy=None, noise=1.0, changed=()
):
    """A Frame of ids; noisy: places of random tokens, None: noise is MASK, the largest id."""
    return trace.Frame(
        nfe,
        ids,
        [i in fresh for i in range(len(ids))],
        [i in changed for i in range(len(ids))],
        [i in remasked for i in range(len(ids))],
        nfe,
        [confidence] * len(ids),
        [token == 599 if noisy is None else i in noisy for i, token in enumerate(ids)],
        noisy is None,
        top,
        noise,
    )


def colours(image):
    return {colour for _, colour in image.getcolors(2**24)}


def rgb(name):
    return tuple(int(name[i : i + 2], 16) for i in (1, 3, 5))


def test_states_look_different(bpe):
    ids = bpe.encode(["a red kite"])[0]
    blank = frame([bpe.mask] * len(ids), nfe=0)
    settled = frame(ids)
    first = list(video.pictures([blank, settled], bpe, "t"))[1][0]
    fresh = list(video.pictures([blank, frame(ids, fresh={1})], bpe, "t"))[1][0]
    again = list(video.pictures([blank, frame([bpe.mask, *ids[1:]], remasked={0})], bpe, "t"))[1][0]
    text = lambda image: image.crop((0, video.TEXT_TOP, video.WIDTH, video.TEXT_BOTTOM))
    assert len({text(image).tobytes() for image in (first, fresh, again)}) == 3
    assert rgb(video.FRESH) in colours(text(fresh)) and rgb(video.FRESH) not in colours(text(first))
    assert rgb(video.REMASKED) in colours(text(again)) and rgb(video.REMASKED) not in colours(
        text(first)
    )
    given = list(
        video.pictures([frame([ids[0]] + [bpe.mask] * (len(ids) - 1)), settled], bpe, "t")
    )[1][0]
    assert rgb(video.GIVEN) in colours(text(given)) and rgb(video.GIVEN) not in colours(text(first))


def random_noise(bpe):
    """Frames of random tokens: noise; one is accepted; it is changed and one renoised; the text."""
    ids = bpe.encode(["a red kite"])[0]
    rest = set(range(1, len(ids)))
    return [
        frame([bpe.mask] * len(ids), nfe=0, confidence=0.0),
        frame(ids, fresh={0, 1}, noisy=rest - {1}, noise=0.7, confidence=0.5),
        frame(ids[::-1], {0}, changed={0}, remasked={1}, noisy=rest, noise=0.8, confidence=0.5),
        frame(ids, fresh=rest, noisy=(), nfe=2, noise=0.0),
    ]


def test_random_tokens_that_are_noise_look_so(bpe):
    """Pale in a hollow box; a token that was there and is now another is in a coloured one."""
    frames = random_noise(bpe)
    _, first, second, last = (image for image, _ in video.pictures(frames, bpe, "t"))
    text = lambda image: colours(image.crop((0, video.TEXT_TOP, video.WIDTH, video.TEXT_BOTTOM)))
    filled = lambda image: sum(
        n
        for n, colour in image.crop((0, 112, 1280, 580)).getcolors(2**24)
        if colour == rgb("#e69f00")
    )
    assert rgb(video.FAINT) in text(first) and rgb(video.REMASKED) in text(second)
    assert 0 < filled(second) < filled(first) / 3, "an outline is no filled box"
    assert rgb(video.FAINT) not in text(last) and rgb(video.REMASKED) not in text(last)
    shown = [trace.shown(f, frames[0].ids, bpe) for f in frames]
    assert pages.marked(shown[1], [False] * 9).count('class="noise"') == len(frames[0].ids) - 2
    assert 'class="again noise"' in pages.marked(shown[2], [False] * 9)


def test_a_draft_is_not_given(bpe):
    """What stands there at first may change; nothing is known of how sure the model is of it."""
    ids = bpe.encode(["a red kite"])[0]
    blank = torch.tensor([ids[:1] + [bpe.mask] * (len(ids) - 1)])
    first = trace.blank_frame(blank[0], bpe.mask, torch.tensor(ids))
    assert first.ids == ids and not any(first.noisy) and first.noise == 0
    assert trace.given_in([first], bpe) == [True] + [False] * (len(ids) - 1)
    step = step_of(1, ids=[*ids[:-1], ids[1]])
    step.fresh = torch.tensor([[False] * (len(ids) - 2) + [True, True]])
    step.confidence, step.masked = torch.zeros(1, len(ids)), torch.zeros(1, len(ids)) > 0
    last = trace.frame_of(1, step, first, remasked=step.masked[0])
    assert last.changed == [False] * (len(ids) - 1) + [True], "another token than before"
    image = next(iter(video.pictures([first, last], bpe, "t")))[0]
    assert video.tint(0.0) not in colours(image.crop((0, 112, 1280, 580)))


def test_tokens_stay_in_place_and_lines_are_not_overfull():
    pieces = [["", "", "", ""], ["To be", "", " or", "\n"], ["To be", ",", " or", "\n"]]
    plan = video.layout([[p or "" for p in row] for row in pieces])
    assert plan.places == [(0, 0), (0, 5), (0, 6), (0, 9)] and plan.cells == [5, 1, 3, 1]
    long = [[f" word{i}" for i in range(400)] + ["\n"] * 3 + ["x" * 250, "end"]]
    plan = video.layout(long)
    for (line, column), width in zip(plan.places, plan.cells):
        assert column + min(width, plan.columns) <= plan.columns and column >= -1
    spots = [
        (line, column + i)
        for (line, column), width in zip(plan.places, plan.cells)
        if width < plan.columns
        for i in range(width)
    ]
    assert len(spots) == len(set(spots)), "no two tokens share a place"


def test_long_text_pages_instead_of_being_cut(bpe):
    ids = bpe.encode([" ".join(tales.generate(1, 20))])[0]
    frames = [frame([bpe.mask] * len(ids), nfe=0), frame(ids, fresh=set(range(len(ids))))]
    images = list(video.pictures(frames, bpe, "t"))
    plan = video.layout([[piece or "" for piece in bpe.pieces(f.ids)] for f in frames])
    assert plan.pages > 1 and plan.size >= 20
    assert [seconds for _, seconds in images] == [None] + [video.PAGE_SECONDS] * plan.pages
    assert len({image.tobytes() for image, _ in images}) == 1 + plan.pages


def test_characters_that_the_font_lacks_are_escaped():
    assert video.printable("a\n") == "a↵" and video.printable("é“ ”") == "é“ ”"
    assert (
        video.printable("漢") == "\\u6f22"
        and video.printable("\x07") == "\\x07"
        and video.printable("😀").startswith("\\U")
    )


def step_of(n, fresh=True, remasked=False, ids=None):
    return SimpleNamespace(
        ids=torch.tensor([[n] if ids is None else ids]),
        fresh=torch.tensor([[fresh]]),
        remasked=torch.tensor([[remasked]]),
        row_nfe=torch.tensor([n]),
        confidence=torch.tensor([[0.5]]),
        masked=torch.tensor([[remasked]]),
        masks=True,
        top=None,
        t=torch.tensor([0.5]),
    )


def test_recording_keeps_the_first_and_the_last_state():
    steps = [step_of(n) for n in range(1, 6)]
    for every, kept in ((1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (5, [0, 5]), (9, [0, 5])):
        frames, stream = trace.record(iter(steps), torch.tensor([[99]]), 99, every)
        assert len(list(stream)) == 5
        assert [f.nfe for f in frames] == kept and frames[0].ids == [99]


def test_skipped_steps_leave_their_marks():
    steps = [
        step_of(1),
        step_of(2, fresh=False),
        step_of(3, fresh=False, remasked=True),
        step_of(4, fresh=False),
    ]
    frames, stream = trace.record(iter(steps), torch.tensor([[99]]), 99, 2)
    list(stream)
    assert [(f.fresh, f.remasked) for f in frames[1:]] == [([True], [False]), ([False], [True])]


def test_tint_tells_how_sure_the_model_was(bpe):
    ids = bpe.encode(["a red kite"])[0]
    blank = frame([bpe.mask] * len(ids), nfe=0)
    sure, unsure = (
        list(video.pictures([blank, frame(ids, confidence=c)], bpe, "t"))[1][0] for c in (1.0, 0.2)
    )
    text = lambda image: colours(image.crop((0, video.TEXT_TOP, video.WIDTH, video.TEXT_BOTTOM)))
    assert video.tint(0.2) in text(unsure) and video.tint(0.2) not in text(sure)
    assert video.tint(1.0) == rgb(video.PAPER)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def __init__(self, tty=True):
        super().__init__()
        self.isatty = lambda: tty


def live(steps, text, **environment):
    out = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            {"TERM": "xterm", "COLUMNS": "30", "LINES": "12"} | environment
        ).items():
            patch.setenv(name, value)
        if "NO_COLOR" not in environment:
            patch.delenv("NO_COLOR", raising=False)
        list(
            terminal.live(
                iter(steps), text, [False, False, True] + [False] * steps[0].ids.size(1), out=out
            )
        )
    return out.getvalue()


def canvas_steps(bpe):
    ids = bpe.encode(["A red kite, a blue kite and a green kite"])[0]
    half = [bpe.mask if i % 2 else token for i, token in enumerate(ids)]
    make = lambda ids, n: SimpleNamespace(
        ids=torch.tensor([ids]),
        masked=torch.tensor([ids]) == bpe.mask,
        fresh=torch.tensor([[i == 0 for i in range(len(ids))]]),
        remasked=torch.zeros(1, len(ids), dtype=torch.bool),
        confidence=torch.full((1, len(ids)), n / 4),
        row_nfe=torch.tensor([n]),
        t=torch.tensor([0.0]),
        masks=True,
    )
    return [make(half, 1), make(ids, 2)]


def test_live_shows_the_noise_level(bpe):
    """Of uniform noise, whose states are all text."""
    step = canvas_steps(bpe)[1]
    step.t, step.masks = torch.tensor([0.4]), False
    shown = live([step], bpe, COLUMNS="80")
    assert "2 NFE, noise level 0.40" in shown and "masks left" not in shown
    step.masked = torch.arange(step.ids.size(1))[None] == 4
    after = SimpleNamespace(**vars(step) | {"fresh": torch.arange(step.ids.size(1))[None] > 2})
    after.masked, after.t = torch.zeros_like(step.masked), torch.zeros(1)
    plain = live([step, after], bpe, COLUMNS="80", NO_COLOR="1").split("\x1b[H")
    assert all("accepted" in part and "renoised" in part for part in plain[2:])
    assert "\x1b[2;3m" in plain[2] and "\x1b[2;3m" not in plain[-1], "noise"
    assert "noise level 0.00" in plain[-1] and "\x1b[1;3m" in plain[-1], "changed"


def test_live_terminal(bpe):
    shown = live(canvas_steps(bpe), bpe)
    assert shown.startswith("\x1b[?1049h") and shown.endswith("\x1b[?25h\x1b[?1049l")
    assert "░" in shown and "\x1b[1;30;43m" in shown and "2 NFE, 0 of" in shown
    assert f"\x1b[4;34m{bpe.pieces(canvas_steps(bpe)[0].ids[0].tolist())[2]}\x1b[0m" in shown, (
        "given"
    )
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.split("\x1b[H")[-1])
    assert max(map(len, last.splitlines())) <= 30 and "green kite" in last
    without = live(canvas_steps(bpe), bpe, NO_COLOR="1")
    assert "\x1b[1;30;43m" not in without and "\x1b[1m" in without and "\x1b[4m" in without
    wide = live(canvas_steps(bpe), bpe, COLUMNS="80").split("\x1b[H")[2:]
    assert all("\x1b[35mmasked again\x1b[0m" in part for part in wide), "the legend, where it fits"
    assert wide[0].count("\x1b[36m") > wide[1].count("\x1b[36m") == 1, (
        "unsure of tokens below one half"
    )
    dumb = live(canvas_steps(bpe), bpe, TERM="dumb")
    assert "\x1b" not in dumb and len(dumb.splitlines()) == 2
    pipe = Terminal(tty=False)
    assert (
        len(list(terminal.live(iter(canvas_steps(bpe)), bpe, [], out=pipe))) == 2
        and pipe.getvalue() == ""
    )


def test_progress_is_shown_in_a_terminal_only(monkeypatch):
    """A bar that goes away at the end; elsewhere, and where hidden, nothing."""
    monkeypatch.setenv("TERM", "xterm")
    for tty, hidden in ((True, False), (False, False), (True, True)):
        out = Terminal(tty)
        with terminal.progress(8, "tokens", hidden, out) as done:
            done(8)
        assert ("8/8" in out.getvalue()) == (tty and not hidden)


def test_live_cleans_up_after_ctrl_c(bpe, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    stream = terminal.live(iter(canvas_steps(bpe)), bpe, [False] * 99, out=out)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    assert out.getvalue().endswith("\x1b[?25h\x1b[?1049l")


def test_html_holds_all_states(bpe, tmp_path):
    ids = bpe.encode(["a red kite </script> <b>"])[0]
    top = [[(ids[0], 0.75), (ids[1], 0.25)]] + [[(ids[1], 1.0)]] * (len(ids) - 1)
    blank = frame([bpe.mask] * len(ids), nfe=0, confidence=0.0)
    half = frame([ids[0]] + [bpe.mask] * (len(ids) - 1), fresh={0}, confidence=0.5, top=top)
    again = frame([bpe.mask] * len(ids), remasked={0}, confidence=0.5, top=top)
    pages.write_html(
        str(tmp_path / "x.html"),
        [blank, half, again, frame(ids, fresh=set(range(len(ids))))],
        bpe,
        "t & <i>",
    )
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 1 and "http" not in page, (
        "nothing in the data ends the script; no network"
    )
    data = json.loads(page.split("const data = ")[1].split(";\n")[0])
    states, shown = [], [None] * len(ids)
    for entry in data["steps"]:  # as the page does it
        for i, token in entry["ids"]:
            shown[i] = token
        states.append(list(shown))
    assert (
        states == [blank.ids, half.ids, again.ids, ids]
        and "".join(data["final"]) == "a red kite </script> <b>"
    )
    assert (
        data["steps"][1]["fresh"] == [0]
        and data["steps"][2]["again"] == [0]
        and data["title"] == "t & <i>"
    )
    assert data["steps"][1]["top"][0] == [0, [[ids[0], 0.75], [ids[1], 0.25]]]
    assert data["steps"][2]["top"] == [], "what did not change is not stored again"


PRESS_KEYS = """<script>
const seen = [], press = key => dispatchEvent(new KeyboardEvent("keydown", {key}));
const shown = () => $("text").textContent.replaceAll("\\u00a0", "").trimEnd();
const look = () => ({status: $("status").textContent, text: shown()});
const move = () => new MouseEvent("mousemove", {bubbles: true});
const hover = i => { spans[i].dispatchEvent(move()); return $("tip").textContent; };
press("Home"); seen.push(look());
press("ArrowRight"); seen.push({...look(), tip: hover(0), colour: spans[0].style.background});
press("c"); seen.push({mode: $("mode").value, colour: spans[0].style.background});
press("End"); seen.push({...look(), tip: hover(0)});
press("d"); const theme = document.documentElement.className; press("d");
seen.push([theme, document.documentElement.className].sort());
$("slider").value = 1; $("slider").oninput(); seen.push(look());
$("play").click();
setTimeout(() => { seen.push(look()); document.title = JSON.stringify(seen); }, 3000);
</script>"""


def in_a_browser(frames, tokenizer, script, page):
    """What the script makes the title of the page of these frames, a file, in a headless browser,
    where one is installed."""
    browser = next(
        filter(
            None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))
        ),
        None,
    )
    if browser is None:
        pytest.skip("no Chromium or Chrome is installed")
    pages.write_html(str(page), frames, tokenizer, "title")
    page.write_text(page.read_text(encoding="utf-8") + script, encoding="utf-8")
    done = subprocess.run(
        [
            browser,
            *"--headless --no-sandbox --disable-gpu --dump-dom --virtual-time-budget=8000".split(),
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))


CLASSES = """<script>
const seen = [];
for (let k = 0; k < T; k++) {
  show(k);
  tip({target: spans[1], clientX: 0, clientY: 0});
  const text = name => document.querySelector(name).textContent;
  const classes = spans.map(span => span.className);
  seen.push({classes, status: text("#status"), tip: text("#tip"), legend: text(".legend")});
}
document.title = JSON.stringify(seen);
</script>"""


def test_random_tokens_in_a_browser(bpe, tmp_path):
    """Each state by its class; and the noise level, not a number of masks."""
    page = tmp_path / "x.html"
    blank, first, second, last = in_a_browser(random_noise(bpe), bpe, CLASSES, page)
    assert set(blank["classes"]) == {"t mask"} and "noise level 1.00" in blank["status"]
    assert first["classes"][:3] == ["t fresh", "t fresh", "t noise"]
    assert second["classes"][:3] == ["t changed", "t noise again", "t noise"]
    assert "noise level 0.80" in second["status"] and "noise" in second["tip"]
    assert "noise" not in " ".join(last["classes"]) and "settled in step" in last["tip"]
    assert "renoised" in last["legend"] and "masked" not in last["legend"]


def test_the_page_in_a_browser(bpe, tmp_path):
    """Keys, slider, play, colours and alternatives."""
    ids = bpe.encode(["a red kite"])[0]
    top = [[(ids[0], 0.75), (ids[1], 0.25)]] + [[(ids[1], 1.0)]] * (len(ids) - 1)
    frames = [
        frame([bpe.mask] * len(ids), nfe=0, confidence=0.0),
        frame([ids[0]] + [bpe.mask] * (len(ids) - 1), fresh={0}, confidence=0.5, top=top),
        frame(ids, fresh=set(range(1, len(ids))), nfe=2, top=top),
    ]
    seen = in_a_browser(frames, bpe, PRESS_KEYS, tmp_path / "x.html")
    blank, half, order, end, themes, slid, played = seen
    assert blank["text"] == "" and f"{len(ids)} of {len(ids)} masks left" in blank["status"]
    assert (
        half["text"] == bpe.pieces(ids)[0]
        and "75.0%" in half["tip"]
        and "settled in step" in half["tip"]
    )
    assert order["mode"] == "order" and order["colour"] != half["colour"]
    assert (
        end["text"] == played["text"] == "a red kite" and "2 network evaluations" in end["status"]
    )
    assert themes == ["", "dark"] and slid == {key: half[key] for key in slid}


def test_diversity():
    same = samples.diversity(["a b c d e", "a b c d e"])
    other = samples.diversity(["a b c d e", "f g h i j"])
    assert same["distinct_2"] == 0.5 and same["self_overlap"] == 1
    assert other["distinct_2"] == 1 and other["self_overlap"] == 0
    assert other["unigram_entropy"] == pytest.approx(math.log(10)) and same[
        "unigram_entropy"
    ] == pytest.approx(math.log(5))


def test_diversity_of_known_texts():
    """Of "a b a b a b c": words a b c of 7, pairs ab ba bc of 6; runs of four abab baba abab babc:
    one of 4 repeats."""
    report = samples.diversity(["a b a b a b c"])
    assert report["distinct_1"] == pytest.approx(3 / 7) and report["distinct_2"] == pytest.approx(
        3 / 6
    )
    assert report["distinct_3"] == pytest.approx(3 / 5) and report["repetition"] == pytest.approx(
        1 / 4
    )
    assert samples.diversity(["", "a"])["repetition"] == 0


def test_runs_that_the_training_text_has():
    training = torch.arange(100)[None]
    rows = torch.cat((torch.arange(20, 30), torch.tensor([500, 501])))[None]
    assert samples.shared_runs(rows, training, 8) == pytest.approx(3 / 5)
    assert samples.shared_runs(rows, torch.zeros(0, 1, dtype=torch.long), 8) == 0
    assert samples.longest_copies(rows, training).tolist() == [10]


def tiny_model(objective, **changes):
    cfg = settings(
        n_layer=1,
        n_head=2,
        n_embd=8,
        tie_embeddings=False,
        final_rows=6,
        final_masks=2,
        data="x",
        seq_len=16,
        objective=objective,
        final_samples=4,
        **(family_defaults(objective) | changes),
    )
    torch.manual_seed(1)
    return Config(**vars(cfg)), Transformer(cfg, 9).eval()


@pytest.mark.parametrize(
    "objective, changes",
    (("masked", {}), ("masked", {"block_len": 4}), ("ar", {}), ("uniform", {})),
)
def test_a_network_that_knows_nothing_by_level(objective, changes):
    """ln V of loss and entropy at every level, 1 / V of accuracy; the bound too."""
    chars = train_char(["abcdefgh"], documents=False)
    cfg, model = tiny_model(objective, **changes)
    torch.nn.init.zeros_(model.head.weight)
    rows = torch.randint(8, (64, 16), generator=runtime.generator(1))
    cfg = dataclasses.replace(cfg, final_rows=64)
    data = encoding.Corpus(None, rows, chars, 0, "", None)
    report = metrics.levels_of(model, family_of(cfg), data, torch.device("cpu")) | metrics.held_out(
        model, family_of(cfg), data, torch.device("cpu")
    )
    for entry in report["levels"]:
        # what stands there says that it was not changed, at little noise
        if objective == "uniform":
            assert entry["loss"] > math.log(8) - 1e-4 and entry["entropy"] < math.log(8) + 1e-4
        else:
            assert entry["loss"] == pytest.approx(math.log(8), abs=1e-5) == entry["entropy"]
        assert 0 <= entry["accuracy"] < 0.3
    assert len(report["levels"]) == (4 if changes else 10)
    # under uniform noise, knowing nothing costs ln V too
    assert report["bound_nats_per_token"] == pytest.approx(
        math.log(8), abs=0.1 if objective == "uniform" else 1e-5
    )
    if objective == "masked":
        assert report["masked_ce_pooled"] == pytest.approx(math.log(8), abs=1e-5) and report[
            "exp_of_masked_ce_schedule_dependent"
        ] == pytest.approx(8, rel=1e-4)


def test_pooled_cross_entropy_is_the_training_loss():
    """Of the sources' preset: what their training prints, on the held-out rows; the schedule weighs
    it."""
    chars = train_char(["abcdefgh"], documents=False)
    rows = torch.randint(8, (256, 16), generator=runtime.generator(2))
    found = {}
    for schedule in ("linear", "md4_cosine"):
        cfg, model = tiny_model("masked", schedule=schedule, corruption="bernoulli")
        for p in model.parameters():
            p.data.mul_(20)
        cfg = dataclasses.replace(cfg, final_rows=256)
        found[schedule] = metrics.levels_of(
            model,
            family_of(cfg),
            encoding.Corpus(None, rows, chars, 0, "", None),
            torch.device("cpu"),
        )
    levels = found["linear"]["levels"]
    by_hand = sum(e["level"] * e["loss"] for e in levels) / sum(e["level"] for e in levels)
    assert found["linear"]["masked_ce_pooled"] == pytest.approx(by_hand, rel=0.05)
    assert found["linear"]["levels"] == found["md4_cosine"]["levels"], (
        "levels do not depend on the schedule"
    )


def test_left_to_right_is_a_plain_loop():
    for changes in ({}, {"block_len": 4}):
        cfg, model = tiny_model("masked", **changes)
        for p in model.parameters():
            p.data.mul_(12)
        rows, total = torch.randint(8, (2, 16), generator=runtime.generator(3)), torch.zeros(2)
        for i in range(16):
            end = 16 if not changes else (i // 4 + 1) * 4  # what is after the block is not seen
            canvas = torch.cat((rows[:, :i], torch.full((2, end - i), 8)), 1)
            total -= (
                family_of(cfg)
                .logits(model, canvas)[:, i]
                .log_softmax(-1)[torch.arange(2), rows[:, i]]
            )
        torch.testing.assert_close(
            metrics.left_to_right(model, family_of(cfg), rows) * 16, total, atol=1e-4, rtol=1e-5
        )


def test_change_rate_of_known_samplers():
    """One token a step of 16: a sixteenth; uniform noise shows all at first."""
    chars = train_char(["abcdefgh"], documents=False)
    cfg, model = tiny_model("masked")
    family, cpu = family_of(cfg), torch.device("cpu")
    blanks = samples.canvases(family, chars, 3)
    judged = partial(samples.generate_rows, model, family, chars, blanks, cpu)
    rows, figures = judged(SampleConfig(sampler="first_hitting"))
    assert (
        figures["change_rate"] == pytest.approx(1 / 16)
        and figures["nfe_a_sample"] == 16
        and rows.shape == (3, 16)
    )
    _, figures = judged(SampleConfig(sampler="random", steps=4))
    assert figures["change_rate"] == pytest.approx(1 / 4)


def test_reference_rows_begin_like_samples():
    chars = train_char(["abcdefgh"], documents=True)
    end = chars.end
    held_out = torch.tensor([[1, 2, end, 3, 4, 5], [6, end, 7, 1, 2, 3], [4, 5, 6, 7, 1, 2]])
    assert samples.reference_rows(held_out, chars, 1).tolist() == [[end, 3, 4, 5, 6, end]]
    assert samples.reference_rows(held_out, chars, 9).tolist() == [[end, 3, 4, 5, 6, end]], (
        "windows do not overlap"
    )
    assert samples.reference_rows(held_out[:1, :2], chars, 9).tolist() == [[1, 2]], (
        "no document begins: as they are"
    )
    rare = torch.cat((held_out[:1], torch.ones(9, 6, dtype=torch.long)))
    assert torch.equal(samples.reference_rows(rare, chars, 8), rare[:8]), (
        "few documents: as much text as there are samples"
    )


def test_what_fills_up_a_row_is_no_copied_text():
    chars = train_char(["abcdefgh"], documents=True)
    end, cfg = chars.end, settings(rows="document")
    rows = torch.tensor(
        [
            [end, 1, 2, 3, 4, end, end, end, end, end, end, end],
            [end, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7],
        ]
    )
    own = samples.without_filling(rows, chars, cfg)
    assert own[0].tolist() == rows[0, :6].tolist() + [-1] * 6 and torch.equal(own[1], rows[1])
    training = torch.tensor(
        [
            [end, 3, 3, 3, end, end, end, end, end, end, end, end],
            [4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 1, 1],
        ]
    )
    assert samples.longest_copies(own, training).tolist() == [4, 9]
    assert (
        samples.shared_runs(own, training, 8) == pytest.approx(2 / 5)
        and samples.shared_runs(own[:1], training, 8) == 0
    )


def test_a_judge_counts_nats_per_character():
    """A network that knows nothing says ln V a token, of one character each; windows are cut, and
    nothing is scored twice."""
    chars = train_char(["abcdefgh"], documents=False)
    cfg, model = tiny_model("ar")
    torch.nn.init.zeros_(model.head.weight)
    state = checkpoint.snapshot(cfg, Corpus(None, None, chars, 0, "", None), model, 1, 1.0)
    checkpoint.save("ar.pt", state)
    judge = judges.load("ar.pt", torch.device("cpu"))
    found = judges.score(["abcdefgh" * 5, "", "aa"], judge)
    assert found["judge_nats_per_character"] == pytest.approx(math.log(8), abs=1e-5)
    assert found["judge_perplexity"] == pytest.approx(8, abs=1e-3)
    assert found["judge_se_texts"] == pytest.approx(0, abs=1e-5)
    # of texts of one length, the standard error of their means
    letters = SimpleNamespace(
        window=9,
        begin=[],
        encode=lambda texts: [list(map(ord, text)) for text in texts],
        nll=lambda ids: torch.tensor(ids, dtype=torch.float32),
    )
    found = judges.score(["aaaa", "bbbb", "cccd", "zzzz"], letters)
    means = torch.tensor([ord("a"), ord("b"), ord("c") + 0.25, ord("z")])
    assert found["judge_nats_per_character"] == pytest.approx(means.mean().item())
    assert found["judge_se_texts"] == pytest.approx(means.std().item() / 2)
    assert set(judges.score(["a"], letters)) == {"judge_nats_per_character", "judge_perplexity"}
    assert judges.score([""], letters) == {}
    # where long texts cost in proportion, none is an error
    assert judges.ratio_error(torch.tensor([2.0, 6, 4]), torch.tensor([1, 3, 2])) == 0
    # each token once, and behind half a window at least once there is one
    ids, seen = list(range(33)), []
    letters.nll = lambda piece: seen.append(piece) or torch.tensor(piece)
    assert judges.token_nll(ids, letters).tolist() == ids
    assert seen[:2] == [list(range(9)), list(range(5, 14))] and len(seen[-1]) > 4


def test_a_judge_of_the_hub_counts_its_own_tokens(monkeypatch):
    """A GPT-2 in a folder as `transformers` writes it: its perplexity is of its own tokens, its
    nats are of characters, and windows are cut."""
    transformers = pytest.importorskip("transformers")
    cfg = transformers.GPT2Config(vocab_size=300, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(cfg).save_pretrained("judge")
    tokenizer = train_bpe(["a red kite, a red boat"] * 9, 300)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    ).save_pretrained("judge")
    judge, text = judges.load("hf:judge", torch.device("cpu")), "a red kite, and a boat, a blue one"
    found, [ids] = judges.score([text, ""], judge), judge.encode([text])
    assert ids == tokenizer.encode([text])[0] and len(ids) > judge.window
    rows = [(ids[:7], 0)] + [(ids[i - 3 : i + 4], 3) for i in range(7, len(ids), 4)]
    with torch.no_grad():
        nats = sum(
            torch.nn.functional.cross_entropy(
                judge.model(torch.tensor([judge.begin + row])).logits[0, :-1],
                torch.tensor(row),
                reduction="none",
            )[known:]
            .sum()
            .item()
            for row, known in rows
        )
    assert found["judge_nats_per_character"] == pytest.approx(nats / len(text), rel=1e-5)
    assert found["judge_perplexity"] == pytest.approx(math.exp(nats / len(ids)), rel=1e-4)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # it would be tried for long
    with pytest.raises(UserError, match="cannot load the judge nowhere/at-all"):
        judges.load("hf:nowhere/at-all", torch.device("cpu"))
    assert not logging.getLogger("huggingface_hub").isEnabledFor(logging.WARNING), "retries"
    theirs = json.load(open("judge/config.json"))  # as a repository with code of its own has them
    theirs |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}}
    json.dump(theirs, open("judge/config.json", "w"))
    open("judge/theirs.py", "w").write("open('ran', 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="cannot load the judge judge"):
        judges.load("hf:judge", torch.device("cpu"))
    assert not os.path.exists("ran")
