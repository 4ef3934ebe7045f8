"""Generate text with a trained model, and watch it appear out of masks.

    python inference.py --prompt "Once upon a time"
    python inference.py --prompt "Once upon a time" --viz-video trace.mp4 --viz-html trace.html
    python inference.py --infill "Tom [8] a boat and [3] red."
    python inference.py --num-samples 4 --sampler entropy_bounded:0.5 --temperature 0.8 --live
    python inference.py --prompt-file prompts.txt --gen-len 40 --json

Needs a checkpoint and nothing else: it holds the tokenizer and the settings.
"""

import contextlib
import json
import sys
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

import diffusion
from config import SampleConfig
from utils import canvas, checkpoint, cli, families, page, ranks, runtime, terminal, trace, video
from utils.tokenizer import Tokenizer

ALTERNATIVES = 5  # likeliest tokens that the page of --viz-html shows


class Loaded(NamedTuple):
    """A checkpoint that is ready to generate."""

    name: str
    model: torch.nn.Module
    family: object  # diffusion.Masked, or one of utils/families.py
    tokenizer: Tokenizer
    hardware: ranks.Hardware


def load(overrides):
    """Flags (dict) -> (SampleConfig, Loaded). Settings come from config.py, then from the
    checkpoint (how its author wanted it sampled), then from the flags."""
    families.check_sampling(cli.merge(SampleConfig, overrides))  # before the checkpoint is read
    path = overrides.get("checkpoint") or checkpoint.newest()
    state = checkpoint.read(path)
    how = cli.merge(SampleConfig, checkpoint.sampling(state, path), overrides)
    for target, ending in ((how.viz_video, ".mp4"), (how.viz_gif, ".gif"), (how.viz_html, ".html")):
        if target:  # rather now than after the work
            trace.check(target, ending)
    device = runtime.choose_device(how.device)
    model, tokenizer, cfg = checkpoint.restore(state, device, path)
    family = families.family_of(cfg)
    if "sampler" in overrides:
        families.check_sampler(family, how)
    dtype = runtime.dtype_of_run(how.dtype, cfg.dtype, device, path)
    hardware = ranks.Hardware(device, dtype)
    return how, Loaded(checkpoint.name_of(path), model, family, tokenizer, hardware)


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


def generate(loaded, how):
    """Generate all that how (SampleConfig) asks for; returns (results, frames of the first row,
    NFE, seconds).

    A result is a dict: text, seed, sampler, nfe (network evaluations), tokens, confidence and step
    (when each token settled; 0: given) of its own row; seconds and tokens_per_second are those of
    the rows that are generated together with it, up to the texts' ends, without viewers' time.
    """
    family, tokenizer, device = loaded.family, loaded.tokenizer, loaded.hardware.device
    rows = canvas.rows_of(how, family, tokenizer)
    results, frames, nfe, seconds = {}, [], 0, 0.0
    stop = None if how.no_stop else tokenizer.end
    for members in canvas.batches(rows, family, tokenizer.vocab_size, device):
        first, blank = 0 in members, torch.tensor([rows[i][0] for i in members], device=device)
        top = ALTERNATIVES if how.viz_html and first else 0
        more = dict(window=family.cfg.seq_len, seeds=[rows[i][1] for i in members], top=top)
        stream = diffusion.sample(family, loaded.model, blank, how, stop=stop, **more)
        watch = Stopwatch(stream, device)
        steps = iter(watch)
        if first and (how.viz_video or how.viz_gif or how.viz_html):
            trace.check_states(rows[0][0], how, family, tokenizer.mask)
            frames, steps = trace.record(steps, blank, tokenizer.mask, how.trace_every)
        if first and how.live:
            given = (blank[0] != tokenizer.mask).tolist()
            steps = terminal.live(steps, tokenizer, given, how.frame_ms)
        with loaded.hardware.autocast():
            last, settled = follow(steps, blank == tokenizer.mask, quiet=first and how.live)
        nfe, seconds, ids = nfe + last.nfe, seconds + watch.seconds, last.ids.tolist()
        end_of = lambda r, i: None if how.no_stop else canvas.end(tokenizer, ids[r], rows[i][0])
        finished = (rows[i][0][: end_of(r, i)] for r, i in enumerate(members))
        generated = sum(row.count(tokenizer.mask) for row in finished)
        for r, i in enumerate(members):
            results[i] = {
                "text": canvas.finished(tokenizer, ids[r], rows[i][0], not how.no_stop),
                "seed": rows[i][1],
                "sampler": family.procedure or how.sampler,
                "nfe": int(last.row_nfe[r]),
                "seconds": watch.seconds,
                "tokens_per_second": generated / watch.seconds,
                "tokens": tokenizer.pieces(ids[r]),
                "confidence": [round(c, 4) for c in last.confidence[r].tolist()],
                "step": settled[r].tolist(),
            }
    return [results[i] for i in range(len(rows))], frames, nfe, seconds


def follow(steps, masked, quiet):
    """(the last of the steps, in which of them each token settled (B, L)), beside a progress bar.
    Of each row, steps in which something happened count; masked (B, L) bool is what is
    generated."""
    settled, number, count = torch.zeros_like(masked, dtype=torch.long), 0, int(masked.sum())
    bar = tqdm(total=count, unit="token", leave=False, disable=True if quiet else None)
    with contextlib.closing(steps), bar:
        for step in steps:
            number = number + (step.fresh | step.remasked).any(1, keepdim=True).long()
            settled = torch.where(step.fresh, number, settled)
            bar.update(round(count * (1 - step.t.mean().item())) - bar.n)
    return step, settled


def write_traces(loaded, how, frames, procedure):
    """The files of --viz-video, --viz-gif and --viz-html."""
    how_it_was = f"{procedure} · temperature {how.temperature:g} · {frames[-1].nfe} NFE"
    title = f"{loaded.name} · {how_it_was}"
    for target, write in ((how.viz_video, video.write_mp4), (how.viz_gif, video.write_gif)):
        if target:
            write(target, video.pictures(frames, loaded.tokenizer, title), how.gif_frame_ms)
    if how.viz_html:
        page.write_html(how.viz_html, frames, loaded.tokenizer, title)
    for target in filter(None, (how.viz_video, how.viz_gif, how.viz_html)):
        print(f"wrote {target}", file=sys.stderr)


def run(positional, overrides):
    how, loaded = load(overrides)
    results, frames, nfe, seconds = generate(loaded, how)
    for result in results:
        head = f"--- seed {result['seed']}\n" if len(results) > 1 else ""
        line = json.dumps(result, ensure_ascii=False) if how.json else head + result["text"]
        print(line)
    procedure = loaded.family.procedure or how.sampler
    print(
        f"{loaded.name} on {loaded.hardware.device.type} | {procedure}, temperature "
        f"{how.temperature:g} | {nfe} network evaluations (NFE), {seconds:.1f} s",
        file=sys.stderr,
    )
    if frames:
        write_traces(loaded, how, frames, procedure)


HINT = 'Give text with --prompt "..." and a model with --checkpoint PATH'
main = cli.command(SampleConfig, run, __doc__, unexpected=HINT, lists=families.show_list)
if __name__ == "__main__":
    cli.run(main)
