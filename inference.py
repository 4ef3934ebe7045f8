"""Generate text with a trained model, and watch it appear out of masks.

    python inference.py --prompt "Once upon a time"
    python inference.py --prompt "Once upon a time" --viz-video trace.mp4 --viz-html trace.html
    python inference.py --infill "Tom [8] a boat and [3] red."
    python inference.py --num-samples 4 --sampler entropy_bounded:0.5 --temperature 0.8 --live
    python inference.py --prompt-file prompts.txt --gen-len 40 --json
    python inference.py --draft "Once upon a time, a cruel bear named Mia lived by the sea. ..."

Needs a checkpoint and nothing else: it holds the tokenizer and the settings. From Python:

    model = load()                                   # a file, a folder, hf:USER/NAME; or the newest
    story = model.generate("Once upon a time", seed=1)          # any of the flags by its name
    print(story, story.nfe)                          # in a notebook the cell shows how it appeared
    for state in model.stream("Once upon a time"):
        print(state.text)
    print(model.nll("Once upon a time, there was a cat."))
"""

import contextlib
import dataclasses
import itertools
import json
import sys
import time
from dataclasses import dataclass

import torch

import diffusion
from config import SampleConfig
from utils import (
    canvas,
    checkpoint,
    cli,
    families,
    metrics,
    page,
    ranks,
    repair,
    runtime,
    terminal,
    trace,
    video,
)
from utils.cli import UserError

ALTERNATIVES = 5  # likeliest tokens that a page of a trace shows


# --- a model that writes --------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A text that was generated, and how."""

    text: str
    seed: int
    sampler: str
    nfe: int  # network evaluations of this text
    seconds: float  # of all that were generated together with it, without viewers' time
    tokens_per_second: float  # of all those, up to the texts' ends
    tokens: list = dataclasses.field(repr=False)  # str of each position of the row
    confidence: list = dataclasses.field(repr=False)  # probability of the likeliest token there
    # in which each settled; 0: given, or as in the draft
    step: list = dataclasses.field(repr=False)
    trace: tuple = dataclasses.field(default=None, repr=False)  # trace.Trace, if recorded

    def __str__(self):
        return self.text

    def _repr_html_(self):
        """What a notebook shows: the page of --viz-html in a frame of its own."""
        return page.framed(*self.trace) if self.trace else page.escaped(self.text)

    def record(self):
        """What --json prints (dict)."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "trace"]
        return {name: getattr(self, name) for name in names}


class Model:
    """A checkpoint that is ready to generate; see `load`.

    name       what it is called
    network    model.Transformer
    family     diffusion.Masked, or one of utils/families.py
    tokenizer  utils.tokenizer.Tokenizer
    hardware   ranks.Hardware: device and dtype
    sampling   how its author wanted it sampled (dict)
    """

    def __init__(self, name, network, family, tokenizer, hardware, sampling):
        self.name, self.network, self.family, self.tokenizer = name, network, family, tokenizer
        self.hardware, self.sampling = hardware, sampling

    def settings(self, **options):
        """SampleConfig of options (flags of this script, by name): from config.py, then as the
        checkpoint's author wanted it sampled, then as the options say."""
        refuse_options(
            options, OF_LOADING, "is chosen when a model is loaded: load(path, device, dtype)"
        )
        check_options(options)
        how = cli.merge(SampleConfig, self.sampling, options)
        if "sampler" in options:
            families.check_sampler(self.family, how)
        return how

    def steps(self, blank, how, seeds, top):
        """The stream of `sampling.Step`s that fills canvases blank (B, L), or improves the draft
        that stands there."""
        stop = None if how.no_stop or how.draft else self.tokenizer.end
        more, spent = dict(window=self.family.cfg.seq_len, seeds=seeds, top=top), 0
        if how.draft:
            rest = (self.network, blank, self.begun(blank, how), how)
            blank, more["draft"], first = repair.begin(self.family, *rest)
            if first:
                spent = first.nfe
                yield first
        for step in diffusion.sample(self.family, self.network, blank, how, stop=stop, **more):
            yield step._replace(nfe=step.nfe + spent, row_nfe=step.row_nfe + spent)

    def begun(self, blank, how):
        """What stands on the canvases blank (B, L) at first, (B, L) long."""
        if not how.draft:
            return blank
        row = canvas.drafted(how, self.family.cfg, self.tokenizer)
        return torch.tensor([row] * len(blank), device=blank.device)

    def generate(self, prompt="", **options):
        """The `Sample` that continues the prompt; a list of them where several are asked for. The
        first has a trace, of fewer states where it is long."""
        refuse_options(options, ("json",), "is for the command line; a Sample has record()")
        how = self.settings(prompt=prompt, **options)
        samples, *_ = generate(self, how, record=True)
        write_traces(how, samples[0].trace)
        return samples if len(samples) > 1 else samples[0]

    def stream(self, prompt="", **options):
        """Yields a `trace.Shown` of the canvas and after every step: the text while it appears."""
        refuse_options(options, OF_GENERATING, "is for generate")
        how = self.settings(prompt=prompt, **options)
        rows = canvas.rows_of(how, self.family, self.tokenizer)
        if len(rows) > 1:
            raise UserError(f"stream shows one text, and {len(rows)} were asked for")
        [(row, seed)], device = rows, self.hardware.device
        blank = torch.tensor([row], device=device)
        shown = lambda frame: trace.shown(frame, row, self.tokenizer, not how.no_stop)
        frame = trace.blank_frame(blank[0], self.tokenizer.mask, self.begun(blank, how)[0])
        yield shown(frame)
        steps = self.steps(blank, how, [seed], 0)
        for number in itertools.count(1):
            with self.hardware.autocast():  # not while the caller works
                step = next(steps, None)
            if step is None:
                return
            frame = trace.frame_of(number, step, frame)
            yield shown(frame)

    def nll(self, text, passes=32, prompt=""):
        """`metrics.TextBound` of the text (str) and its end, in nats: an upper bound on -log p, the
        mean over so many passes of masks; exact for an autoregressive model. A model of pairs
        judges it as the answer to the prompt."""
        if not isinstance(text, str) or not isinstance(passes, int) or passes < 1:
            raise UserError("nll takes a text (str) and a number of passes of at least 1")
        with self.hardware.autocast():
            rest = (self.tokenizer, text, passes, prompt)
            return metrics.text_bound(self.network, self.family, *rest)


OF_LOADING = ("checkpoint", "device", "dtype")  # flags that `load` takes
OF_GENERATING = ("viz_video", "viz_gif", "viz_html", "live", "json", "trace_every")


def refuse_options(options, names, why):
    """Complain of the first option (by name) that is no option here."""
    for name in names:
        if name in options:
            raise UserError(f"{name} {why}")


def check_options(options):
    """Complain of options (dict) that no model has, or of a file that cannot be written: rather now
    than after the work."""
    how = cli.merge(SampleConfig, options)
    families.check_sampling(how)
    for target, ending in ((how.viz_video, ".mp4"), (how.viz_gif, ".gif"), (how.viz_html, ".html")):
        if target:
            trace.check(target, ending)
    return how


def load(path="", device=SampleConfig.device, dtype=SampleConfig.dtype):
    """The `Model` of a checkpoint: a run's file, an exported folder, or hf:USER/NAME[@revision] of
    the Hugging Face hub; `checkpoint.default` where path is ""."""
    path = path or checkpoint.default()
    state = checkpoint.read(path)
    device = runtime.choose_device(device)
    sampling = checkpoint.sampling(state, path)
    network, tokenizer, cfg = checkpoint.restore(state, device, path)
    hardware = ranks.Hardware(device, runtime.dtype_of_run(dtype, cfg.dtype, device, path))
    family, name = families.family_of(cfg), checkpoint.name_of(path)
    return Model(name, network, family, tokenizer, hardware, sampling)


# --- generating -----------------------------------------------------------------------------------


class Stopwatch:
    """Passes a stream of steps on, and adds up the seconds that they took, without those of whoever
    looks at them."""

    def __init__(self, steps, device):
        self.steps, self.device, self.seconds = steps, device, 0.0

    def __iter__(self):
        start = time.perf_counter()
        for step in self.steps:
            runtime.synchronise(self.device)
            self.seconds += time.perf_counter() - start
            yield step
            start = time.perf_counter()


def generate(model, how, record=False):
    """(list of `Sample`, NFE, seconds) of all that how (SampleConfig) asks for; record: the first
    has a trace, as it has where a viewer's file is asked for."""
    family, tokenizer, device = model.family, model.tokenizer, model.hardware.device
    rows = canvas.rows_of(how, family, tokenizer)
    viewed = bool(how.viz_video or how.viz_gif or how.viz_html)
    if viewed:
        trace.check_states(rows[0][0], how, family, tokenizer.mask)
    light = trace.least_every(rows[0][0], how, family, tokenizer.mask, trace.UNASKED)
    every = how.trace_every if viewed else max(how.trace_every, light)
    record = record or viewed
    samples, nfe, seconds = {}, 0, 0.0
    for members in canvas.batches(rows, family, tokenizer.vocab_size, device):
        first, blank = 0 in members, torch.tensor([rows[i][0] for i in members], device=device)
        top = ALTERNATIVES if first and record and (how.viz_html or not viewed) else 0
        begun = model.begun(blank, how)
        watch = Stopwatch(model.steps(blank, how, [rows[i][1] for i in members], top), device)
        steps, frames = iter(watch), []
        if first and record:
            frames, steps = trace.record(steps, blank, tokenizer.mask, every, begun)
        if first and how.live:
            given = (blank[0] != tokenizer.mask).tolist()
            noisy = (begun[0] == tokenizer.mask).tolist()
            steps = terminal.live(steps, tokenizer, given, how.frame_ms, noisy)
        with model.hardware.autocast():
            last, settled = follow(steps, blank == tokenizer.mask, quiet=first and how.live)
        nfe, seconds, ids = nfe + last.nfe, seconds + watch.seconds, last.ids.tolist()
        end_of = lambda r, i: None if how.no_stop else canvas.end(tokenizer, ids[r], rows[i][0])
        finished = (rows[i][0][: end_of(r, i)] for r, i in enumerate(members))
        generated = sum(row.count(tokenizer.mask) for row in finished)
        for r, i in enumerate(members):
            samples[i] = Sample(
                text=canvas.finished(tokenizer, ids[r], rows[i][0], not how.no_stop),
                seed=rows[i][1],
                sampler=family.sampler_name(how),
                nfe=int(last.row_nfe[r]),
                seconds=watch.seconds,
                tokens_per_second=generated / watch.seconds,
                tokens=tokenizer.pieces(ids[r]),
                confidence=[round(c, 4) for c in last.confidence[r].tolist()],
                step=settled[r].tolist(),
                trace=traced(model, how, frames) if frames and i == 0 else None,
            )
    return [samples[i] for i in range(len(rows))], nfe, seconds


def traced(model, how, frames):
    """The `trace.Trace` of frames, with a title that says how it was."""
    parts = (model.name, model.family.sampler_name(how), temperature_of(how))
    title = " · ".join((*parts, f"{frames[-1].nfe} NFE"))
    return trace.Trace(frames, model.tokenizer, title)


def temperature_of(how):
    """In words, as titles have it."""
    falls = "" if how.final_temperature is None else f" to {how.final_temperature:g}"
    return f"temperature {how.temperature:g}{falls}"


def follow(steps, masked, quiet):
    """(the last of the steps, in which of them each token settled (B, L)), beside a progress bar.
    Of each row, steps in which something happened count; masked (B, L) bool is what is
    generated."""
    settled, number, count = torch.zeros_like(masked, dtype=torch.long), 0, int(masked.sum())
    with contextlib.closing(steps), terminal.progress(count, "tokens", hidden=quiet) as done:
        for step in steps:
            number = number + (step.fresh | step.remasked).any(1, keepdim=True).long()
            settled = torch.where(step.fresh, number, settled)
            done(round(count * (1 - step.t.mean().item())))
    return step, settled


def write_traces(how, seen):
    """The files of --viz-video, --viz-gif and --viz-html of what was seen (`trace.Trace`)."""
    for target, write in ((how.viz_video, video.write_mp4), (how.viz_gif, video.write_gif)):
        if target:
            write(target, video.pictures(*seen), how.gif_frame_ms)
    if how.viz_html:
        page.write_html(how.viz_html, *seen)
    for target in filter(None, (how.viz_video, how.viz_gif, how.viz_html)):
        print(f"wrote {target}", file=sys.stderr)


def run(positional, overrides):
    chosen = check_options(overrides)  # before the checkpoint is read
    model = load(chosen.checkpoint, chosen.device, chosen.dtype)
    how = model.settings(**{k: v for k, v in overrides.items() if k not in OF_LOADING})
    samples, nfe, seconds = generate(model, how)
    for sample in samples:
        head = f"--- seed {sample.seed}\n" if len(samples) > 1 else ""
        record = json.dumps(sample.record(), ensure_ascii=False) if how.json else ""
        print(record or head + sample.text)
    sampled = f"{samples[0].sampler}, {temperature_of(how)}"
    print(
        f"{model.name} on {model.hardware.device.type} | {sampled} | {nfe} network evaluations "
        f"(NFE), {seconds:.1f} s",
        file=sys.stderr,
    )
    write_traces(how, samples[0].trace)


HINT = 'Give text with --prompt "..." and a model with --checkpoint PATH'
main = cli.command(SampleConfig, run, __doc__, unexpected=HINT, lists=families.show_list)
if __name__ == "__main__":
    cli.run(main)
