"""Train a diffusion language model: masked, of blocks, of uniform noise; or an autoregressive one,
to compare.

    python train.py                                  the default preset (see --list)
    python train.py shakespeare --max_iters 500      a preset, with changes
    python train.py shakespeare --block_len 16       another family: blocks
    python train.py shakespeare --objective ar       another family: autoregressive, or uniform
    python train.py --data my.txt                    your own text
    python train.py my_experiment.py                 config = {"preset": "tales", "n_layer": 6}
    python train.py --resume auto                    go on with the newest run
    torchrun --standalone --nproc_per_node=8 train.py speedrun      on several GPUs

Every setting of config.py is a flag. Writes artifacts/models/NAME.pt (the last state) and
NAME.best.pt (the best held-out bound), artifacts/logs/NAME.jsonl, and at the end
artifacts/logs/NAME.json and a plot of the loss curves.
"""

import contextlib
import dataclasses
import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm

import diffusion
from config import Config, SampleConfig
from utils import (
    canvas,
    checkpoint,
    cli,
    encoding,
    families,
    importance,
    metrics,
    optim,
    ranks,
    runs,
    runtime,
    samples,
    settings,
    tracking,
)
from utils.cli import UserError

TRACKED = 10  # steps between points of live curves
SHOWN_STEPS = 64  # of the sampler, for the text that is shown at each evaluation


# --- a step of training --------------------------------------------------------------------------


class Batch(NamedTuple):
    """A process's part of a step's global batch, on the CPU."""

    pieces: list  # of (x0 (b, L), Corruption)
    seed: int  # of its dropout
    # rows of the global batch; of pairs, whose loss is stated per token of the answers, what those
    # make when put together to rows
    rows: float


def draw_batch(family, data, step, hardware, density=None):
    """The `Batch` of a step.

    Everything random is a function of (seed, step), drawn for the whole batch and cut by row: so
    the number of processes and of micro-batches changes nothing (but what dropout drops), and a
    resumed run needs no generator's state. (With max_minutes the learning rate follows the clock.)
    """
    cfg = family.cfg
    generator, L = runtime.generator(cfg.seed, "masks", step), cfg.seq_len
    # as LLaDA: canvases can be shorter than the window
    if torch.rand((), generator=generator) < cfg.short_rows:
        L = family.fit(2 + int(torch.randint(cfg.seq_len - 1, (), generator=generator)))
    local, number, given = cfg.batch_size // hardware.world, cfg.batch_size, None
    rows = slice(hardware.rank * local, (hardware.rank + 1) * local)
    size = cfg.micro_batch or local
    if cfg.rows == "pair":  # what is corrupted depends on what is given, in the global batch
        x0 = data.batch(step, slice(None))
        given = encoding.given_of(x0, data.tokenizer, cfg)
        number = encoding.count_tokens(x0, data.tokenizer, cfg).sum().item() / L
        x0 = x0[rows]
    else:
        x0 = data.batch(step, rows)[:, :L]
    whole = family.corrupt((cfg.batch_size, L), generator, density, given)
    seed = int(torch.randint(2**31, (), generator=generator)) + hardware.rank
    if cfg.complementary:
        x0 = x0[::2].repeat_interleave(2, 0)
    pieces = list(zip(x0.split(size), whole.split(rows, size), strict=True))
    if hardware.device.type == "cuda":
        pin = torch.Tensor.pin_memory
        pieces = [(pin(x0), corruption.each(pin)) for x0, corruption in pieces]
    return Batch(pieces, seed, number)


def mean_loss(network, family, piece, rows, hardware, token_nll):
    """The piece's part of the mean loss of a batch of so many rows."""
    with hardware.autocast():
        x0, corruption = hardware.move(piece[0]), piece[1].to(hardware.device)
        return family.loss(network, x0, corruption, token_nll).sum() / rows


def gradients(
    network, family, batch, hardware, token_nll=diffusion.token_nll, scale=lambda loss: loss
):
    """Add the gradients of the batch's mean loss to the parameters; returns this process's part of
    that loss."""
    (pieces, seed, rows), cfg = batch, family.cfg
    torch.manual_seed(seed)
    total = torch.zeros((), device=hardware.device)
    full_length = pieces[0][0].size(1) == cfg.seq_len  # shorter rows are not worth compiling anew
    with contextlib.nullcontext() if full_length else torch.compiler.set_stance("force_eager"):
        for number, piece in enumerate(pieces, 1):
            with ranks.gradient_sync(network, number == len(pieces)):
                loss = mean_loss(network, family, piece, rows, hardware, token_nll)
                scale(loss * hardware.world).backward()  # processes' gradients are averaged
            total += loss.detach()
    return total


def train_step(run, progress, batch, fraction):
    """One optimizer step; fraction of the run that is done, in [0, 1]. Returns this process's part
    of the loss, and the norm of the gradient before it is clipped."""
    cfg, scaler = run.cfg, run.scaler
    loss = gradients(run.network, run.family, batch, run.hardware, run.token_nll, scaler.scale)
    for optimizer in run.optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), cfg.grad_clip or math.inf)
    if scaler.is_enabled() and not norm.isfinite():
        run.model.zero_grad()  # float16 overflowed somewhere, so that none of the optimizers steps
    lr_scale = optim.lr_scale(cfg, progress.step, fraction)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_scale
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    if run.ema:
        optim.update_average(run.ema, run.model, cfg.ema, progress.step)
    progress.running = progress.running + loss
    progress.step, progress.counted = progress.step + 1, progress.counted + 1
    return loss, norm


# --- evaluating, saving, logging: nothing here changes what is trained ---------------------------


def evaluate(run, progress, so_far):
    """Held-out bound, a line of the log, a text, the best checkpoint. so_far: the training loss
    that all processes have summed up since the last time."""
    cfg, hardware, judged = run.cfg, run.hardware, run.ema or run.model
    loss = so_far.item() / progress.counted
    run.model.eval()
    with hardware.autocast():
        rows = run.data.held_out[: cfg.eval_rows].to(hardware.device)
        nll = metrics.bound(judged, run.family, run.data.tokenizer, rows)
        text = "" if run.quiet else show_sample(run.family, judged, run.data, hardware.device)
    run.model.train()
    progress.nll, error, _ = metrics.mean_and_errors(nll)
    progress.running, progress.counted = torch.zeros_like(progress.running), 0
    if not hardware.rank:
        entry = {"step": progress.step, "loss": loss, "bound": progress.nll, "bound_se_rows": error}
        runtime.write_line(run.path["log"], entry | {"minutes": progress.minutes})
        figures = {name: number for name, number in entry.items() if name != "step"}
        run.track(progress.step, figures, text)
    run.say(
        f"step {progress.step:,} | training loss {loss:.4f} | held-out bound {progress.nll:.4f} "
        f"± {error:.4f} nats per token | {cli.duration(60 * progress.minutes)}\n    {text[:300]!r}"
    )
    if progress.nll < run.best and not hardware.rank:
        state = checkpoint.snapshot(cfg, run.data, judged, progress.step, progress.nll)
        checkpoint.save(run.path["best"], state)
    run.best = min(run.best, progress.nll)


def show_sample(family, model, data, device):
    """An unconditional sample (str), or the first held-out question and an answer, in at most
    SHOWN_STEPS NFE, always of the same random numbers."""
    length = family.cfg.seq_len
    blank = samples.canvases(family, data.tokenizer, 1, data.held_out).to(device)
    how = SampleConfig(steps=min(SHOWN_STEPS, length))
    *_, last = diffusion.sample(family, model, blank, how, seeds=[0])
    question = canvas.question(data.tokenizer, blank[0].tolist())
    return question + canvas.finished(data.tokenizer, last.ids[0].tolist())


def check_finite(loss, run, step):
    """Stop before a broken state is saved."""
    if not (loss.isfinite() and all(p.isfinite().all() for p in run.model.parameters())):
        raise UserError(
            f"the loss or a weight is not finite at step {step}; nothing was saved since the last "
            f"checkpoint. Try a lower --lr ({run.cfg.lr:g}) and --muon_lr ({run.cfg.muon_lr:g}), "
            "or --dtype float32"
        )


def save(run, progress, so_far):
    """The last checkpoint: what inference needs, and for a resumed run `Progress` as it stands (its
    running loss summed over all processes), averaged weights, optimizers and scaler."""
    if run.hardware.rank:
        return
    state = checkpoint.snapshot(run.cfg, run.data, run.model, **vars(progress))
    state |= {"running": so_far, "scaler": run.scaler.state_dict(), "job": ranks.torchrun_job()}
    state["ema"] = run.ema.state_dict() if run.ema else None
    state["optimizers"] = [optimizer.state_dict() for optimizer in run.optimizers]
    checkpoint.save(run.path["last"], state)


def show_speed(run, progress, bar):
    """Loss and tokens a second, beside the progress bar. Reading the loss waits for a GPU, so not
    at every step."""
    bar.update()
    if progress.counted % 10 and run.hardware.device.type != "cpu":
        return
    so_far = run.hardware.sum(progress.running)
    if not so_far.isfinite():
        check_finite(so_far, run, progress.step)
    rate = (bar.format_dict["rate"] or 0) * run.cfg.batch_size * run.cfg.seq_len
    bar.set_postfix_str(f"loss {so_far.item() / progress.counted:.4f}, {rate:,.0f} tokens/s")


def track_step(run, progress, loss, norm, steps_per_second):
    """The figures of a step, for live curves."""
    loss = run.hardware.sum(loss)
    rates = {
        f"learning_rate_{type(optimizer).__name__}".lower(): optimizer.param_groups[0]["lr"]
        for optimizer in run.optimizers
    }
    figures = {
        "loss_of_step": loss.item(),
        "gradient_norm": norm.item(),
        "tokens_per_second": steps_per_second * run.cfg.batch_size * run.cfg.seq_len,
    }
    if not run.hardware.rank:
        run.track(progress.step, figures | rates)


# --- the loop ------------------------------------------------------------------------------------


def loop(run, progress, batches, minutes, stop, bar):
    """Train until all steps or minutes are done, or `stop` is filled; returns (whether they are,
    mean seconds of a step of this session, without evaluations)."""
    cfg = run.cfg
    saved = begun = progress.step  # the last step that was saved, and where this session began
    busy, clock = 0.0, time.perf_counter()
    tracked = begun, 0.0  # the last step of the live curves, and how busy it was then
    due = lambda interval: progress.step % interval == 0
    while True:
        # all processes must decide alike, so the first one's clock and Ctrl-C count
        progress.minutes, stopped = run.hardware.agree((minutes(), bool(stop)))
        fraction = progress.fraction(cfg)
        finished = fraction >= 1 and progress.step > 0  # at least one step, however short the time
        done = finished or stopped
        # counted: steps since the last evaluation, those before a resumed run was stopped too
        evaluates = progress.counted and (due(cfg.eval_interval) or finished)
        saves = (due(cfg.save_interval or cfg.eval_interval) or done) and (
            progress.counted or progress.step != saved
        )
        if evaluates or saves:
            so_far = run.hardware.sum(progress.running)
            check_finite(so_far, run, progress.step)  # waits for the GPU, so the clock counts it
            busy += time.perf_counter() - clock
        if evaluates:
            evaluate(run, progress, so_far)
            so_far = torch.zeros_like(so_far)
        if saves:
            save(run, progress, so_far)
            saved = progress.step
        if done:
            return finished, busy / max(1, progress.step - begun)
        if evaluates or saves:
            clock = time.perf_counter()
        if importance.is_due(cfg, progress.step):
            progress.density = importance.measure(run, progress.step)
        loss, norm = train_step(run, progress, next(batches), fraction)
        show_speed(run, progress, bar)
        if cfg.track != "none" and due(TRACKED):
            spent, (step, before) = busy + time.perf_counter() - clock, tracked
            track_step(run, progress, loss, norm, (progress.step - step) / (spent - before))
            tracked = progress.step, spent


def batches_of(run, progress, pool):
    """Yields the batch of each step. Where there is a pool (for a GPU), the next one is drawn while
    this one is computed, unless the density of times will be another."""
    ready, draw = None, partial(draw_batch, run.family, run.data)
    while True:
        batch = ready.result() if ready else draw(progress.step, run.hardware, progress.density)
        following = progress.step + 1
        ahead = pool and not importance.is_due(run.cfg, following)
        ready = pool.submit(draw, following, run.hardware, progress.density) if ahead else None
        yield batch


def one_pass(run, step, network, token_nll):
    """Seconds of a step forward and backward, which leaves no gradient."""
    start = time.perf_counter()
    family = families.family_of(dataclasses.replace(run.cfg, short_rows=0.0))
    batch = draw_batch(family, run.data, step, run.hardware)
    gradients(network, family, batch, run.hardware, token_nll)
    run.model.zero_grad()
    runtime.synchronise(run.hardware.device)
    return time.perf_counter() - start


def train(cfg, state=None, quiet=False):
    """Run the training loop for `cfg`, from the beginning or from the checkpoint dict `state`;
    returns the metrics."""
    started = time.perf_counter()
    run, progress = runs.set_up(cfg, state, quiet)
    hardware, before = run.hardware, progress.minutes
    minutes = lambda: before + (time.perf_counter() - started) / 60
    runs.choose_network(run, progress, partial(one_pass, run, progress.step))
    total = runs.introduce(run, progress, minutes())
    with contextlib.ExitStack() as after:  # closes and puts back, however the run ends
        if cfg.track != "none" and not hardware.rank:
            run.track, close = tracking.start(run.cfg, progress.step)
            after.callback(close)
        if not hardware.rank:
            runtime.begin_log(run.path["log"], progress.step)
        stop = []  # filled by Ctrl-C: finish the step, save, leave
        if not quiet or hardware.rank:  # a comparison, which is quiet, is stopped at once
            after.callback(runtime.restore_signals, runtime.on_interrupt(lambda: stop.append(True)))
        bar = tqdm(
            initial=progress.step,
            total=total,
            unit="step",
            dynamic_ncols=True,
            disable=run.quiet or None,
        )
        after.enter_context(bar)
        cuda = hardware.device.type == "cuda"
        batches = batches_of(
            run, progress, after.enter_context(ThreadPoolExecutor(1)) if cuda else None
        )
        finished, seconds_a_step = loop(run, progress, batches, minutes, stop, bar)
    ranks.end(hardware)
    if finished:
        return {} if hardware.rank else runs.finish(run, progress, seconds_a_step)
    resume = f"go on with: python train.py --resume {run.path['last']}"
    run.say(
        f"stopped at step {progress.step:,}; {resume if progress.step else 'nothing was done yet'}"
    )
    return {}


def run_command(positional, overrides):
    if "resume" in overrides:
        return train(*checkpoint.resumed_config(positional, overrides))
    cfg, why = settings.load(positional, overrides)
    if path := checkpoint.interrupted(cfg.out_dir, cfg.name):  # torchrun started this run anew
        return train(*checkpoint.resumed_config([], {"resume": path}))
    if runtime.is_first():
        print(why)
    return train(cfg)


main = cli.command(Config, run_command, __doc__, lists=families.show_list)
if __name__ == "__main__":
    cli.run(main)
