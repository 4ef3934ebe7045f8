"""Write text with a trained model, and watch it appear out of masks.

    python inference.py --prompt "Once upon a time"
    python inference.py --prompt "Once upon a time" --viz-video artifacts/media/trace.mp4
    python inference.py --num-samples 4 --sampler ancestral --steps 32 --temperature 0.8
    python inference.py --checkpoint artifacts/models/tales.best.pt --gen-len 40 --viz-gif trace.gif

Needs a checkpoint and nothing else: it holds the tokenizer and the settings.
"""
import os
import sys
import time

from tqdm import tqdm

import config
import diffusion
from config import Config, SampleConfig, UserError
from utils import canvas, checkpoint, runtime, trace


def load(argv):
    """Command line -> (SampleConfig, model, Text, Config, device, path of the checkpoint).

    Settings come from config.py, then from the checkpoint (how its author wanted it sampled), then from the flags.
    """
    positional, overrides = config.parse(argv, SampleConfig)
    if positional:
        raise UserError(f"what is {positional[0]}? Give text with --prompt \"...\" and a model with --checkpoint PATH")
    check(config.merge(SampleConfig, overrides))  # complain before the checkpoint is read
    path = overrides.get("checkpoint") or checkpoint.newest(os.path.join(Config.out_dir, "models"))
    state = checkpoint.read(path)
    options = config.merge(SampleConfig, state["sample"], overrides)
    check(options)
    for target, ending in ((options.viz_video, ".mp4"), (options.viz_gif, ".gif")):
        if target:  # rather now than after the work
            trace.check(target, ending)
    device = runtime.choose_device(options.device)
    return (options, *checkpoint.restore(state, device, path), device, path)


def check(options):
    config.check_name("sampler", options.sampler, diffusion.SAMPLERS)
    config.check_name("schedule", options.schedule, diffusion.SCHEDULES)


def generate(model, text, options, block_size, device, dtype):
    """Write options.num_samples rows; returns (finished texts, frames of row 0, network evaluations, seconds)."""
    blank = canvas.build(text, [options.prompt] * options.num_samples, options.gen_len, block_size).to(device)
    steps = diffusion.sample(
        model, blank, sampler=options.sampler, steps=options.steps, schedule=options.schedule,
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        seeds=range(options.seed, options.seed + options.num_samples))
    frames, steps = trace.record(steps, blank, options.trace_every)
    masks, start = int((blank == text.mask).sum()), time.perf_counter()
    with runtime.autocast(device, dtype), tqdm(total=masks, unit="token", disable=None, leave=False) as bar:
        for step in steps:
            bar.update(int(step.fresh.sum()))
    rows = [canvas.finished(text, row) for row in step.ids.tolist()]
    return rows, frames, step.evaluations, time.perf_counter() - start


def main(argv):
    if "--help" in argv or "-h" in argv:
        return config.show_help(SampleConfig, __doc__)
    if "--list" in argv:
        return config.show_list(diffusion.SAMPLERS, diffusion.SCHEDULES)
    options, model, text, cfg, device, path = load(argv)
    dtype = runtime.choose_dtype(options.dtype, device)
    name = os.path.basename(path).removesuffix(".pt")
    rows, frames, evaluations, seconds = generate(model, text, options, cfg.block_size, device, dtype)
    for number, row in enumerate(rows):
        if len(rows) > 1:
            print(f"--- seed {options.seed + number}")
        print(row)
    print(f"{name} on {device.type} | {options.sampler}, temperature {options.temperature:g} | "
          f"{evaluations} network evaluations, {seconds:.1f} s", file=sys.stderr)
    title = f"{name} · {options.sampler} · temperature {options.temperature:g}"
    for target, write in ((options.viz_video, trace.write_mp4), (options.viz_gif, trace.write_gif)):
        if target:
            write(target, trace.pictures(frames, text, title), options.gif_frame_ms)
            print(f"wrote {target}", file=sys.stderr)


if __name__ == "__main__":
    config.run(main)
