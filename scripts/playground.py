"""A page to play with: text appearing out of masks in the browser, one sampler or two side by side
on the same canvas and seed.

    pip install gradio
    python scripts/playground.py                     # then open http://127.0.0.1:7860
    python scripts/playground.py --checkpoint hf:ME/tales --port 8000

The page is reachable from this machine alone, unless --host or --share says otherwise.
"""

import functools
import glob
import os
import shlex
import sys
import time
from dataclasses import dataclass
from itertools import zip_longest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from config import DEVICES, Config
from inference import load
from utils import checkpoint, cli, page, pairs, runtime
from utils.built_in import BUILT_IN
from utils.cli import UserError, field


@dataclass(frozen=True)
class PlaygroundConfig:
    checkpoint: str = field("", "file, folder or hf:USER/NAME to begin with", "what")
    host: str = field("127.0.0.1", "address to listen at; 0.0.0.0: reachable from other machines")
    port: int = field(7860, "of the page", low=1, high=65535)
    share: bool = field(False, "a public address for three days, through gradio's server")
    device: str = field("auto", "auto: cuda, else mps, else cpu", choices=DEVICES)

    def __post_init__(self):
        cli.check(self)


NONE, OWN = "none", "as the model generates"  # no second sampler; a family without a choice


def checkpoints():
    """Paths of what can be chosen: the runs' best, newest first, exported folders and those that
    came with the repository."""
    files = glob.glob(os.path.join(Config.out_dir, "models", "*.pt"))
    best = [f for f in files if f.endswith(".best.pt")]
    last = [f for f in files if f not in best and f.removesuffix(".pt") + ".best.pt" not in best]
    folders = [
        os.path.dirname(file)
        for place in ("export", "pretrained")
        for file in sorted(glob.glob(os.path.join(Config.out_dir, place, "*", "config.json")))
    ]
    return sorted(best + last, key=os.path.getmtime, reverse=True) + folders


def model_of(path, device):
    """The Model of a checkpoint, which is kept until its file changes."""
    file = os.path.join(path, "model.safetensors") if os.path.isdir(path) else path
    return kept_model(path, device, os.path.getmtime(file) if os.path.exists(file) else None)


@functools.lru_cache(maxsize=4)
def kept_model(path, device, changed):
    return load(path, device)


def options_of(model, prompt, suffix, infill, gen_len, steps, temperature, seed, sampler, number):
    """Options (dict) of `Model.stream` for what stands in the page's fields, without those that
    are as the model has them anyway. A template takes the place of prompt, suffix and length."""
    prompt, suffix, gen_len = ("", "", 0) if infill else (prompt, suffix, gen_len)
    named = "" if sampler == OWN else f"{sampler}:{number}" if number.strip() else sampler
    found = dict(prompt=prompt, suffix=suffix, infill=infill, gen_len=int(gen_len or 0) or None)
    found |= dict(steps=int(steps or 0) or None, temperature=temperature, seed=int(seed or 0))
    usual = model.settings()
    named = "" if named == model.family.sampler_name(usual) else named
    return {
        name: value
        for name, value in (found | {"sampler": named}).items()
        if value not in (None, "") and value != getattr(usual, name)
    }


def command_of(path, device, options):
    """The command line (str) that gives the same text."""
    words = ["python", "inference.py", "--checkpoint", path]
    for name, value in (options | ({} if device == "auto" else {"device": device})).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def watch(model, options):
    """Yields (HTML of the text, line about it) after every step. Tokens a second are those that are
    unmasked, of the time without the page's."""
    seconds, given, total, state = 0.0, None, 0, None
    states, start = model.stream(**options), time.perf_counter()
    for state in states:
        seconds += time.perf_counter() - start
        if given is None:
            given, total = [token is not None for token in state.tokens], state.tokens.count(None)
        written = (1 - state.noise) * total
        masks = state.tokens.count(None)
        left = f"{masks} of {total} masks left" if state.masks else f"noise level {state.noise:.2f}"
        rate = f", {written / seconds:,.0f} tokens/s" if state.nfe else ""
        line = f"step {state.number}, {state.nfe} NFE, {left}{rate}"
        yield page.marked(state, given), line
        start = time.perf_counter()
    if said := verdict(model, state.text, options.get("prompt", "")):
        yield page.marked(state, given), f"{line}. {said}"


def verdict(model, text, prompt):
    """What is known of a text of a model of a built-in corpus; "" of others."""
    made = BUILT_IN.get(model.family.cfg.data)
    if made:
        return made.verdict(pairs.asked(prompt, text) if made.pairs else text)
    return ""


def write(path, device, fields_, samplers):
    """Yields (HTML, line, HTML, line, command) while one or two texts are written, turn by turn.
    samplers: (name, number) of each."""
    model = model_of(path, device)
    chosen = [one for one in samplers if one[0] != NONE]
    all_options = [options_of(model, *fields_, *one) for one in chosen]
    commands = "\n".join(command_of(path, device, options) for options in all_options)
    streams = [watch(model, options) for options in all_options]
    shown = [("", "")] * 2
    for states in zip_longest(*streams):
        for number, state in enumerate(states):
            shown[number] = state or shown[number]
        yield *shown[0], *shown[1], commands


def about(model):
    """A line about a model."""
    cfg, name = model.family.cfg, model.family.name
    size = model.network.num_parameters()
    return f"{name[0].upper()}{name[1:]}, {size:,} parameters, {os.path.basename(cfg.data)}"


def blocks(options):
    """The page (gradio.Blocks)."""
    import gradio as gr

    paths = checkpoints()
    first = options.checkpoint or (paths[0] if paths else "")
    offered = [first, *(path for path in paths if path != first)] if first else []
    local = options.host in ("127.0.0.1", "localhost", "::1") and not options.share

    def chosen(path):
        """What a checkpoint makes of the page."""
        try:
            check_path(path)
            model = model_of(path, options.device)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        usual = model.settings()
        names = [OWN] if model.family.procedure else list(model.family.samplers)
        name, _, number = model.family.sampler_name(usual).partition(":")
        name = name if name in names else names[0]
        return (
            about(model),
            gr.Dropdown(names, value=name),
            number,
            gr.Dropdown([NONE, *names], value=NONE),
            usual.temperature,
        )

    def check_path(path):
        """Who comes from another machine chooses from what is offered, and reads no other file."""
        if path not in offered and not local:
            raise UserError(f"{path} is none of the checkpoints that are offered here")

    def run(path, prompt, suffix, infill, gen_len, steps, temperature, seed, *samplers):
        fields_ = (prompt, suffix, infill, gen_len, steps, temperature, seed)
        try:
            check_path(path)
            yield from write(path, options.device, fields_, (samplers[:2], samplers[2:]))
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    with gr.Blocks(title="nanoDLM", analytics_enabled=False) as demo:
        gr.HTML(page.STYLE + "<h1>nanoDLM: text out of masks</h1>")
        with gr.Row():
            path = gr.Dropdown(
                offered,
                value=first or None,
                label="Checkpoint (or type a path, or hf:USER/NAME)",
                allow_custom_value=local,
                scale=2,
            )
            info = gr.Textbox(label="What it is", interactive=False, scale=2)
        with gr.Row():
            prompt = gr.Textbox(label="Prompt", value="Once upon a time", scale=2)
            suffix = gr.Textbox(label="Suffix (the text ends with it)")
            infill = gr.Textbox(label="Or a template: Tom [8] a boat.")
        with gr.Row():
            samplers = []
            for number in ("Sampler", "Beside it"):
                samplers += [
                    gr.Dropdown([NONE], value=NONE, label=number, min_width=160),
                    gr.Textbox(label="its number (empty: the usual)", min_width=80),
                ]
        with gr.Row():
            steps = gr.Number(
                label="Steps (0: as many as it needs)", value=0, precision=0, min_width=90
            )
            temperature = gr.Slider(0, 2, value=1.0, step=0.05, label="Temperature", min_width=180)
            length = gr.Number(
                label="Tokens to write (0: the window)", value=0, precision=0, min_width=90
            )
            seed = gr.Number(label="Seed", value=0, precision=0, min_width=80)
            go = gr.Button("Write", variant="primary", min_width=80)
            stop = gr.Button("Stop", min_width=80)
        gr.HTML(page.LEGEND)
        with gr.Row():
            outputs = []
            for _ in range(2):
                with gr.Column(min_width=280):
                    line, text = gr.Markdown(), gr.HTML()
                    outputs += [text, line]
        command = gr.Code(
            label="The same from the command line", language="shell", lines=1, wrap_lines=True
        )
        inputs = [path, prompt, suffix, infill, length, steps, temperature, seed, *samplers]
        begun = [
            event(run, inputs, [*outputs, command], show_progress="hidden")
            for event in (go.click, prompt.submit)
        ]
        stop.click(None, cancels=begun)
        looks = [info, samplers[0], samplers[1], samplers[2], temperature]
        path.change(chosen, path, looks)
        if first:
            demo.load(chosen, path, looks)
    return demo


def run(positional, overrides):
    options = cli.merge(PlaygroundConfig, overrides)
    runtime.choose_device(options.device)  # complains of one that is missing
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UserError("the playground needs the package gradio: pip install gradio") from None
    if options.checkpoint:
        checkpoint.read(options.checkpoint)  # rather now than in the page
    elif not checkpoints():
        raise UserError(
            f"there is no checkpoint in {Config.out_dir}/models; train one with: python train.py"
        )
    try:
        blocks(options).queue().launch(
            server_name=options.host, server_port=options.port, share=options.share
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot open the page: {cli.reason(error)}; try another --port or --host"
        ) from None


main = cli.command(PlaygroundConfig, run, __doc__, unexpected="Name the model with --checkpoint {}")
if __name__ == "__main__":
    cli.run(main)
