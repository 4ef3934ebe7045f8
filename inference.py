"""Write text with a trained model, and watch it appear out of masks.

    python inference.py --prompt "Once upon a time"
    python inference.py --prompt "Once upon a time" --viz-video artifacts/media/trace.mp4 --viz-html trace.html
    python inference.py --infill "Tom [8] a boat and [3] red."
    python inference.py --num-samples 4 --sampler entropy_bounded:0.5 --temperature 0.8 --live
    python inference.py --prompt-file prompts.txt --gen-len 40 --json

Needs a checkpoint and nothing else: it holds the tokenizer and the settings.
"""
import contextlib
import json
import os
import sys
import time

import torch
from tqdm import tqdm

import diffusion
from config import SampleConfig
from utils import canvas, checkpoint, cli, families, page, policies, runtime, terminal, trace, video
from utils.cli import UserError

ALTERNATIVES = 5       # likeliest tokens that the page of --viz-html shows
MOST_GENERATED = 2**24   # tokens of all texts together: what is kept of each is some 100 bytes


def load(overrides):
    """Flags (dict) -> (SampleConfig, model, Tokenizer, Config, device, path of the checkpoint).

    Settings come from config.py, then from the checkpoint (how its author wanted it sampled), then from the flags.
    """
    check(cli.merge(SampleConfig, overrides))  # complain before the checkpoint is read
    path = overrides.get("checkpoint") or checkpoint.newest()
    state = checkpoint.read(path)
    options = cli.merge(SampleConfig, checkpoint.sampling(state, path), overrides)
    check(options)
    for target, ending in ((options.viz_video, ".mp4"), (options.viz_gif, ".gif"), (options.viz_html, ".html")):
        if target:  # rather now than after the work
            trace.check(target, ending)
    device = runtime.choose_device(options.device)
    model, tokenizer, cfg = checkpoint.restore(state, device, path)
    family = families.family_of(cfg)
    if "sampler" in overrides and options.sampler.partition(":")[0] not in family.samplers:
        raise UserError(f"sampler={options.sampler} with {family.name}, which has one of its own: --steps says how long "
                        "it works")
    return options, model, tokenizer, cfg, device, path


def check(options):
    policies.find_sampler(options.sampler, policies.SAMPLERS | policies.UNIFORM_SAMPLERS)
    cli.check_name("schedule", options.schedule, diffusion.SCHEDULES)


def canvases(options, tokenizer, cfg):
    """Rows to fill: list of (canvas, a list of ids; seed). What is given differs, the rest is MASK."""
    if options.infill:
        templates = [canvas.parse_infill(options.infill)]
    else:
        prompts = [options.prompt]
        if options.prompt_file:
            try:
                with open(options.prompt_file, encoding="utf-8") as file:
                    prompts = [line for line in file.read().splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"cannot read the prompts of {options.prompt_file}: {cli.reason(error)}") from None
            if not prompts:
                raise UserError(f"{options.prompt_file} is empty; write a prompt on each line")
        templates = [[p for p in (prompt, options.gen_len, options.suffix) if p != ""] for prompt in prompts]
    rows = [canvas.build(tokenizer, template, cfg.seq_len) for template in templates]
    if families.family_of(cfg).block_len and any(tokenizer.mask in row[:i] for row in rows for i, token in enumerate(row)
                                                 if token != tokenizer.mask):
        raise UserError("this model writes from left to right and sees nothing of what comes after; give a --prompt, without "
                        "--suffix and --infill, or train a masked model (--objective masked, without --block_len)")
    if sum(map(len, rows)) * options.num_samples > MOST_GENERATED:
        raise UserError(f"{len(rows) * options.num_samples:,} texts of up to {max(map(len, rows)):,} tokens are more than "
                        f"{MOST_GENERATED:,} tokens together; ask for fewer at a time")
    return [(row, options.seed + i) for row in rows for i in range(options.num_samples)]


def batches(rows, cfg, vocabulary, device):
    """Indices (lists) of the rows, a list of (canvas, seed), that are written together: those of a length, as many as fit."""
    for length in dict.fromkeys(len(row) for row, _ in rows):
        members = [i for i, (row, _) in enumerate(rows) if len(row) == length]
        size = runtime.rows_at_once(families.family_of(cfg), vocabulary, length, device)
        yield from (members[start:start + size] for start in range(0, len(members), size))


def most_states(row, options, cfg, mask):
    """How many states a trace of the row (list of ids) can have at most; a step that changes nothing has none."""
    masks, family = row.count(mask), families.family_of(cfg)
    sampler = family.sampler(options)
    if sampler.policy is policies.reverse:
        return (options.steps or len(row)) * (1 + options.correctors)
    if not options.steps or family.block_len == 1 or sampler.policy is policies.first_hitting:  # one token a step
        return masks
    # steps are rounded up in each block
    blocks = -(-len(row) // (family.block_len or options.decode_block or max(1, cfg.seq_len // 4)))
    return options.steps + blocks if sampler.may_remask else min(masks, options.steps + blocks)


def generate(model, tokenizer, options, cfg, device, dtype):
    """Generate all rows of `options`; returns (results, frames of the first row, NFE, seconds).

    A result is a dict: text, seed, sampler, evaluations, tokens, confidence and step (when each token settled; 0: given)
    of its own row; seconds and tokens_per_second of the rows that are written together with it (`batches`), counting the
    tokens of the finished texts and not the time of viewers.
    """
    rows, results, frames, nfe, total = canvases(options, tokenizer, cfg), {}, [], 0, 0.0
    family = families.family_of(cfg)

    def timed(steps, spent):
        start = time.perf_counter()
        for step in steps:
            runtime.synchronise(device)
            spent.append(time.perf_counter() - start)
            yield step
            start = time.perf_counter()

    for members in batches(rows, cfg, tokenizer.vocab_size, device):
        blank = torch.tensor([rows[i][0] for i in members], device=device)
        spent = []
        steps = timed(diffusion.sample(
            family, model, blank, options, window=cfg.seq_len,
            stop=None if options.no_stop else tokenizer.end,
            top=ALTERNATIVES if options.viz_html and 0 in members else 0, seeds=[rows[i][1] for i in members]), spent)
        if 0 in members:
            if options.viz_video or options.viz_gif or options.viz_html:
                trace.check_states(most_states(rows[0][0], options, cfg, tokenizer.mask), blank.size(1), options.trace_every,
                                   bool(options.viz_html))
                frames, steps = trace.record(steps, blank, tokenizer.mask, options.trace_every)
            if options.live:
                steps = terminal.live(steps, tokenizer, (blank[0] != tokenizer.mask).tolist(), options.frame_ms)
        settled, masks = torch.zeros_like(blank), int((blank == tokenizer.mask).sum())
        number = torch.zeros_like(blank[:, :1])  # of steps in which something happened in each row
        with contextlib.closing(steps), runtime.autocast(device, dtype), tqdm(
                total=masks, unit="token", leave=False, disable=True if options.live and 0 in members else None) as bar:
            for step in steps:
                number = number + (step.fresh | step.remasked).any(1, keepdim=True)
                settled = torch.where(step.fresh, number, settled)
                bar.update(round(masks * (1 - step.t.mean().item())) - bar.n)
        seconds, final = sum(spent), step.ids.tolist()
        nfe, total = nfe + step.nfe, total + seconds
        ends = [len(ids) if options.no_stop else canvas.end(tokenizer, ids, rows[i][0]) for ids, i in zip(final, members)]
        generated = sum(rows[i][0][:end].count(tokenizer.mask) for end, i in zip(ends, members))
        for row, (i, ids) in enumerate(zip(members, final)):
            results[i] = {
                "text": canvas.finished(tokenizer, ids, rows[i][0], not options.no_stop), "seed": rows[i][1],
                "sampler": family.procedure or options.sampler,
                "evaluations": int(step.row_nfe[row]), "seconds": seconds,
                "tokens_per_second": generated / seconds, "tokens": tokenizer.pieces(ids),
                "confidence": [round(c, 4) for c in step.confidence[row].tolist()], "step": settled[row].tolist()}
    return [results[i] for i in range(len(rows))], frames, nfe, total


def run(positional, overrides):
    options, model, tokenizer, cfg, device, path = load(overrides)
    dtype = runtime.dtype_of_run(options.dtype, cfg.dtype, device, path)
    name = os.path.basename(path).removesuffix(".pt")
    results, frames, nfe, seconds = generate(model, tokenizer, options, cfg, device, dtype)
    for result in results:
        if options.json:
            print(json.dumps(result, ensure_ascii=False))
            continue
        if len(results) > 1:
            print(f"--- seed {result['seed']}")
        print(result["text"])
    procedure = families.family_of(cfg).procedure or options.sampler
    print(f"{name} on {device.type} | {procedure}, temperature {options.temperature:g} | {nfe} network evaluations, {seconds:.1f} s",
          file=sys.stderr)
    if frames:
        title = f"{name} · {procedure} · temperature {options.temperature:g} · {frames[-1].nfe} evaluations"
        for target, write in ((options.viz_video, video.write_mp4), (options.viz_gif, video.write_gif)):
            if target:
                write(target, video.pictures(frames, tokenizer, title), options.gif_frame_ms)
                print(f"wrote {target}", file=sys.stderr)
        if options.viz_html:
            page.write_html(options.viz_html, frames, tokenizer, title)
            print(f"wrote {options.viz_html}", file=sys.stderr)


main = cli.command(SampleConfig, run, __doc__, lists=families.show_list, unexpected=(
    "Give text with --prompt \"...\" and a model with --checkpoint PATH"))
if __name__ == "__main__":
    cli.run(main)
