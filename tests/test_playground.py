"""The page to play with: what it writes, its command lines, and a real browser where there is
one."""

import os
import re
import shlex
import shutil
import sys
import time

import pytest
from conftest import TINY, load, run

import inference
import train
from scripts import playground

FAMILIES = {
    "masked": TINY,
    "blocks": [*TINY, "--rows", "stream", "--seq_len", "24", "--block_len", "4"],
    "uniform": [*TINY, "--objective", "uniform", "--time_conditioning", "sinusoidal"],
    "ar": [*TINY, "--objective", "ar"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{family: path of a tiny model's checkpoint}"""
    folder = tmp_path_factory.mktemp("runs")
    for name, words in FAMILIES.items():
        words = ["tales", *words, "--name", name, "--out_dir", str(folder)]
        train.train(load(words)[0], quiet=True)
    return {name: str(folder / "models" / f"{name}.best.pt") for name in FAMILIES}


# prompt, suffix, template, tokens, steps, temperature, seed
USUAL = ("One day", "", "", 0, 0, 1.0, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_command_line_gives_the_same_text(name, runs, monkeypatch, capsys):
    """Of every family, with what the page begins with."""
    model = playground.model_of(runs[name], "cpu")
    sampler = playground.OWN if model.family.procedure else list(model.family.samplers)[-1]
    fields = USUAL[:4] + (8, 0.5, 7) if name != "ar" else USUAL
    *_, (text, line, _, other, commands) = playground.write(
        runs[name], "cpu", fields, ((sampler, ""), (playground.NONE, ""))
    )
    assert "step " in line and "tory of the grammar" in line
    assert not other and text.startswith('<div class="trace">')
    [command] = commands.splitlines()
    words = shlex.split(command)
    assert words[:3] == ["python", "inference.py", "--checkpoint"]
    code, out, err = run(inference.main, [*words[2:], "--device", "cpu"], monkeypatch, capsys)
    options = playground.options_of(model, *fields, sampler, "")
    assert code == 0 and out == model.generate(**options).text + "\n", err
    assert len(words) == 6 + 2 * len(options), "what is usual is not said"
    usual = model.family.sampler_name(model.settings())
    assert "sampler" not in playground.options_of(model, *fields, usual, "")


def test_two_samplers_side_by_side(runs):
    """The same canvas and seed; one text is ready before the other; a template takes the place of
    the prompt."""
    fields = ("One day", " sad.", "Tom [6] a boat [3].", 0, 0, 1.0, 3)
    samplers = (("confidence", ""), ("threshold", "0.01"))
    states = list(playground.write(runs["masked"], "cpu", fields, samplers))
    assert len(states) == 11, "the canvas, a token a step, and the verdict"
    first, line, second, beside, commands = states[-1]
    assert "9 NFE" in line and "1 NFE" in beside
    left, right = commands.splitlines()
    assert "--infill 'Tom [6] a boat [3].'" in left and "--prompt" not in left
    assert "--sampler confidence" in left and "--sampler threshold:0.01" in right
    assert 'class="given">Tom' in first and 'class="given">Tom' in second


def test_uniform_noise_says_how_much_is_left(runs):
    """And the grammar judges the last state alone."""
    fields = USUAL[:4] + (8, 1.0, 0)
    sampler = (("reverse", ""), (playground.NONE, ""))
    lines = [line for _, line, *_ in playground.write(runs["uniform"], "cpu", fields, sampler)]
    assert "noise level 0.88" in lines[1] and "noise level 0.00" in lines[-1]
    assert sum("of the grammar" in line for line in lines) == 1 and "grammar" in lines[-1]


def test_a_checkpoint_that_changes_is_read_anew(runs, tmp_path):
    """A run that trains beside the page."""
    path = str(tmp_path / "x.pt")
    shutil.copy(runs["masked"], path)
    first = playground.model_of(path, "cpu")
    assert playground.model_of(path, "cpu") is first
    os.utime(path, (1, 1))
    assert playground.model_of(path, "cpu") is not first


def test_marks(runs):
    """As in the other viewers, and what is no markup is none."""
    model = playground.model_of(runs["masked"], "cpu")
    states = list(model.stream("One day", steps=8, sampler="remdm_cap:1"))
    shown = [playground.page.marked(state, [False] * 67) for state in states]
    assert shown[0].count('"mask"') == 63 and 'class="fresh"' in shown[1]
    assert any('class="mask again"' in text for text in shown)
    odd = states[-1]._replace(tokens=["<b>"] + states[-1].tokens[1:])
    assert "&lt;b&gt;" in playground.page.marked(odd, [False] * 67)


def test_mistakes(runs, monkeypatch, capsys):
    code, _, err = run(playground.main, "--device cpu", monkeypatch, capsys)
    assert code == 2 and "train one with" in err and err.count("\n") == 1
    code, _, err = run(playground.main, "--checkpoint none.pt", monkeypatch, capsys)
    assert code == 2 and "there is no checkpoint none.pt" in err
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = run(playground.main, "--device cpu", monkeypatch, capsys)
    assert code == 2 and "pip install gradio" in err and err.count("\n") == 1


def test_it_listens_to_this_machine_alone(runs, monkeypatch, capsys):
    import gradio

    asked = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **more: asked.update(more))
    words = ["--checkpoint", runs["masked"], "--device", "cpu"]
    assert run(playground.main, words, monkeypatch, capsys)[0] == 0
    assert asked == {"server_name": "127.0.0.1", "server_port": 7860, "share": False}


def test_in_a_browser(runs):
    """Write, and the text appears: in a headless Chromium, where one is installed."""
    browser, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not browser or not driver:
        pytest.skip("no Chromium with a driver is installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By

    options = webdriver.ChromeOptions()
    for flag in "headless=new no-sandbox disable-gpu disable-background-networking".split():
        options.add_argument(f"--{flag}")
    settings = playground.PlaygroundConfig(checkpoint=runs["masked"], device="cpu")
    demo = playground.blocks(settings).queue()
    _, address, _ = demo.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    chromium = webdriver.Chrome(options=options, service=Service(driver))
    try:
        chromium.get(address)
        body = lambda: chromium.find_element(By.TAG_NAME, "body").text
        values = lambda: [
            area.get_attribute("value") for area in chromium.find_elements(By.TAG_NAME, "textarea")
        ]
        wait(lambda: any("15,552 parameters" in value for value in values()))
        [write] = [b for b in chromium.find_elements(By.TAG_NAME, "button") if b.text == "Write"]
        write.click()
        wait(lambda: re.search(r", 0 of \d+ masks left", body()))
        assert "sentences fit" in body() and "python inference.py --checkpoint" in body()
        given = chromium.find_elements(By.CSS_SELECTOR, ".trace .given")
        assert "".join(one.text for one in given[1:]).split() == "Once upon a time".split()
    finally:
        chromium.quit()
        demo.close()


def wait(happened, seconds=30):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.2)
