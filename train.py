"""Train a diffusion language model: masked, of blocks, of uniform noise; or an autoregressive one, to compare.

    python train.py                                  the default preset (see --list)
    python train.py shakespeare --max_iters 500      a preset, with changes
    python train.py shakespeare --block_len 16       another family: --objective ar, --objective uniform
    python train.py --data my.txt --name mine        your own text
    python train.py my_experiment.py                 settings in a file: config = {"preset": "tales", "n_layer": 6}
    python train.py --resume auto                    go on with the newest run
    torchrun --standalone --nproc_per_node=8 train.py speedrun      on several GPUs

Every setting of config.py is a flag. Writes artifacts/models/NAME.pt (the last state) and NAME.best.pt (the best
held-out bound), artifacts/logs/NAME.jsonl, and at the end artifacts/logs/NAME.json and a plot of the loss curves.
"""
import contextlib
import copy
import dataclasses
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

import config
import diffusion
from config import Config, SampleConfig
from model import Transformer, count_parameters
from utils import canvas, checkpoint, cli, corpus, metrics, optim, plots, runtime
from utils.cli import UserError

# seconds of eager CPU training: compiling takes up to a minute, a step is then 1.2 (float32) to 2 times (bfloat16) as fast
COMPILE_PAYS = 300
DENSITY_EVERY, DENSITY_ROWS = 100, 256  # steps between measurements of time_sampling=importance, and rows of each
SHOWN_STEPS = 64  # of the sampler, for the text that is shown at each evaluation
# what --init_from must agree on
SHAPE = ("n_layer", "n_head", "n_embd", "tie_embeddings", "rope_base", "softcap", "time_conditioning")


def make_model(cfg, text, given):
    """The network, new or with the weights of the checkpoint dict `given`, that of --init_from."""
    torch.manual_seed(cfg.seed)
    model = Transformer(cfg, text.vocab_size)
    if given:
        theirs = cli.merge(Config, given["config"])
        table = ("diffusion_steps",) * (cfg.time_conditioning == "table")
        for name in SHAPE + table:  # some of these leave the shapes of the weights alone, so loading would not notice
            if getattr(cfg, name) != getattr(theirs, name):
                raise UserError(f"--init_from {cfg.init_from} was trained with {name}={getattr(theirs, name)}, not "
                                f"{getattr(cfg, name)}; give --{name} {getattr(theirs, name)}")
        with checkpoint.fitting(cfg.init_from):
            model.load_state_dict(given.get("ema") or given["model"])
    return model


def check_size(cfg, vocab_size, ranks, device):
    """Complain of a network or a batch that cannot fit into memory, by what they need at least: before they take it, since
    a machine without memory ends a process without a word. (A GPU says so itself.)"""
    parameters = count_parameters(cfg, vocab_size)
    # in float32: weights, gradients and the optimizers' averages; on a GPU they are made on the CPU first
    runtime.check_memory(parameters * (4 if device.type == "cuda" else 12), f"a network of {parameters:,} parameters "
                         f"(n_layer={cfg.n_layer}, n_embd={cfg.n_embd}, vocab_size={vocab_size})")
    if device.type == "cpu":
        rows = cfg.micro_batch or cfg.batch_size // ranks.world
        # what a backward pass needs of each token: ten bfloat16 activations of a channel in a block, or what a block begins
        # with; the logits, at half of the positions
        a_token = cfg.n_layer * cfg.n_embd * (2 if cfg.activation_checkpointing else 20) + vocab_size
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # that share this machine's memory
        runtime.check_memory(processes * rows * cfg.block_size * a_token, f"a pass of {rows} rows of {cfg.block_size} tokens (micro_batch="
                             f"{cfg.micro_batch}, batch_size={cfg.batch_size}, block_size={cfg.block_size})")


def prepare(cfg, data, step, ranks, device, density=None):
    """(this rank's part of the step's global batch: a list of (x0 (b, L), Corruption), on the CPU; seed of its dropout).

    Everything random is a function of (seed, step), drawn for the whole batch and cut by row: so the number of ranks and
    of micro-batches changes nothing (but what dropout drops), and a resumed run needs no generator's state.
    """
    generator, L = runtime.generator(cfg.seed, "masks", step), cfg.block_size
    if torch.rand((), generator=generator) < cfg.short_rows:  # as LLaDA: canvases can be shorter than the window
        L = 2 + int(torch.randint(cfg.block_size - 1, (), generator=generator))
        if block := diffusion.block_len(cfg):  # whole ones
            given = diffusion.given_tokens(cfg)
            L = given + max(1, (L - given) // block) * block
    whole = diffusion.draw_corruption(cfg, cfg.batch_size, L, generator, density)
    seed = int(torch.randint(2**31, (), generator=generator)) + ranks.rank
    share = cfg.batch_size // ranks.world
    rows = slice(ranks.rank * share, (ranks.rank + 1) * share)
    size = cfg.micro_batch or share
    x0 = data.batch(step, rows)[:, :L]
    if cfg.complementary:
        x0 = x0[::2].repeat_interleave(2, 0)
    pieces = list(zip(x0.split(size), diffusion.split_corruption(cfg, whole, rows, size, density), strict=True))
    if device.type == "cuda":
        pieces = [(x.pin_memory(), corruption.each(torch.Tensor.pin_memory)) for x, corruption in pieces]
    return pieces, seed


def gradients(network, cfg, pieces, seed, ranks, device, dtype, token_nll=diffusion.token_nll, scale=lambda loss: loss):
    """Add the gradients of the batch's mean loss to the parameters; returns this rank's share of that loss."""
    torch.manual_seed(seed)
    total = torch.zeros((), device=device)
    # a shorter row is no reason to compile anew
    short = torch.compiler.set_stance("force_eager") if pieces[0][0].size(1) < cfg.block_size else contextlib.nullcontext()
    with short:
        for number, (x0, corruption) in enumerate(pieces, 1):
            with runtime.gradient_sync(network, number == len(pieces)):
                with runtime.autocast(device, dtype):
                    loss = diffusion.OBJECTIVES[cfg.objective].loss(
                        network, runtime.move(x0, device), corruption.to(device), cfg, token_nll).sum() / cfg.batch_size
                scale(loss * ranks.world).backward()  # ranks' gradients are averaged
            total += loss.detach()
    return total


def measures_density(cfg, step):
    """Whether the density of times is measured before this step."""
    return cfg.time_sampling == "importance" and step > 0 and step % DENSITY_EVERY == 0


def measure_density(model, cfg, data, step, ranks, device, dtype):
    """`diffusion.time_density` of coming training rows, the same on all ranks."""
    rows = torch.cat([data.batch(step + i, slice(None)) for i in range(-(-DENSITY_ROWS // cfg.batch_size))])[:DENSITY_ROWS]
    model.eval()
    with runtime.autocast(device, dtype):
        density = diffusion.time_density(model, rows.to(device), cfg, cfg.micro_batch or 64)
    model.train()
    return torch.tensor(runtime.agree(ranks, density.tolist()), dtype=density.dtype)


def show_sample(model, text, cfg, device):
    """An unconditional sample (str) in at most SHOWN_STEPS network evaluations, always from the same random numbers."""
    blank = torch.tensor([canvas.build(text, [None], cfg.block_size)], device=device)
    steps = min(SHOWN_STEPS, cfg.block_size)
    *_, last = diffusion.sample(model, blank, steps=steps, top_p=SampleConfig.top_p, seeds=[0], **diffusion.options_of(cfg))
    return canvas.finished(text, last.ids[0].tolist())


def choose_network(model, cfg, data, step, left, ranks, device, dtype):
    """(`model`, compiled where that pays, a token_nll that fits it, seconds of a pass forward and backward).

    A few passes over the first batch tell; they leave no gradient. left: what cfg.max_minutes leaves, in minutes.
    """
    full_rows = dataclasses.replace(cfg, short_rows=0.0)

    def timed(network, token_nll=diffusion.token_nll):
        times = []
        for _ in range(4):
            start = time.perf_counter()
            batch = prepare(full_rows, data, step, ranks, device)
            gradients(network, cfg, *batch, ranks, device, dtype, token_nll)
            model.zero_grad()
            runtime.synchronise(device)
            times.append(time.perf_counter() - start)
        return min(times[2:])

    seconds, compiled = None, None
    wanted = cfg.compile == "on" or cfg.compile == "auto" and device.type == "cuda"
    if not wanted:
        seconds = runtime.agree(ranks, timed(model))
        run = min((cfg.max_iters or math.inf) * seconds - step * seconds, 60 * left if cfg.max_minutes else math.inf)
        wanted = cfg.compile == "auto" and device.type == "cpu" and run > COMPILE_PAYS
    if wanted:
        compiled = runtime.compile_network(model, diffusion.token_nll, device, timed)
        if runtime.sum_over_ranks(ranks, torch.tensor(float(compiled is None))):  # all compile, or none
            compiled = None
    network, token_nll, seconds = compiled or (model, diffusion.token_nll, seconds or timed(model))
    return network, token_nll, runtime.agree(ranks, seconds)


def duration(seconds):
    """12 s, 3 min 20 s, 2 h 05 min"""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def train(cfg, state=None, quiet=False):
    """Run the training loop for `cfg`, from the beginning or from the checkpoint dict `state`; returns the metrics."""
    started = time.perf_counter()
    diffusion.check_names(cfg)
    if not cfg.name:
        raise UserError("the run has no name; give it one with --name")
    runtime.keep_memory()
    ranks, device = runtime.start_ranks(cfg.device)
    piece = cfg.micro_batch or (2 if cfg.complementary else 1)
    if cfg.batch_size % (ranks.world * piece):
        raise UserError(f"batch_size={cfg.batch_size} cannot be shared among {ranks.world} processes"
                        + (f" in pieces of {piece} rows" if piece > 1 else ""))
    quiet = quiet or ranks.rank > 0
    say = (lambda *_: None) if quiet else lambda line: tqdm.write(line)
    dtype = runtime.choose_dtype(cfg.dtype, device)
    given = state or (checkpoint.read(cfg.init_from) if cfg.init_from else None)
    with runtime.first_rank_first(ranks):  # it prepares the corpus where need be
        data = corpus.load(cfg, corpus.tokenizer.from_json(given["tokenizer"]) if given else None)
    check_size(cfg, data.text.vocab_size, ranks, device)
    model = make_model(cfg, data.text, None if state else given).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval() if cfg.ema else None
    judged = ema or model
    optimizers = optim.make_optimizers(model, cfg, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, best, minutes, nll, density = 0, math.inf, 0.0, math.inf, None
    running, counted = torch.zeros((), device=device), 0  # sum of the training loss since the last evaluation, and steps
    if state:
        corpus.check_same(data, state.get("corpus"), cfg)
        step, minutes, nll = state["step"], state["minutes"], state["nll"]
        with checkpoint.fitting(f"the checkpoint of {cfg.name}"):
            running, counted = state["running"].reshape(()).to(device) / ranks.world, state["counted"]
            if (density := state.get("density")) is not None:
                density = density.reshape(diffusion.SPREAD_BINS)
            model.load_state_dict(state["model"])
            if ema:
                ema.load_state_dict(state["ema"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optim.load(optimizer, saved, begun=step > 0 and not state["scaler"])
            if state["scaler"]:  # empty if the run did not use float16 before
                scaler.load_state_dict(state["scaler"])
    else:
        cfg = dataclasses.replace(cfg, name=runtime.agree(ranks, checkpoint.unused_name(cfg.out_dir, cfg.name)))
    if given:
        given.clear()  # frees as much memory as weights and optimizers take
    path = {kind: os.path.join(cfg.out_dir, folder, cfg.name + ending) for kind, folder, ending in (
        ("last", "models", ".pt"), ("best", "models", ".best.pt"), ("log", "logs", ".jsonl"),
        ("metrics", "logs", ".json"), ("plot", "plots", ".loss.png"), ("levels", "plots", ".levels.png"))}
    if os.path.exists(path["best"]):  # of the run that is resumed
        best = checkpoint.read(path["best"])["nll"]

    model.train()
    left = cfg.max_minutes - minutes
    forward, token_nll, seconds = choose_network(model, cfg, data, step, left, ranks, device, dtype)
    network = runtime.distribute(forward, ranks, device)
    # what auto meant is kept, so that a resumed run decides the same
    cfg = dataclasses.replace(cfg, device=device.type, dtype=runtime.dtype_name(dtype),
                              compile="off" if forward is model else "on")
    tokens_a_step, left = cfg.batch_size * cfg.block_size, left - (time.perf_counter() - started) / 60
    total = min(cfg.max_iters or math.inf, step + max(1, int(60 * left / seconds)) if cfg.max_minutes else math.inf)
    memory = runtime.peak_memory(device) + 8 * model.num_parameters()  # and the optimizers' averages
    say(f"{cfg.name}: {model.num_parameters():,} parameters, vocabulary {data.text.vocab_size:,} | "
        f"{f'{data.tokens:,} training tokens' if data.tokens else 'fresh stories every step'}, "
        f"{len(data.held_out):,} held-out rows of {cfg.block_size}")
    say(f"{cfg.device} {cfg.dtype}{', compiled' if forward is not model else ''}"
        f"{f', {ranks.world} processes' if ranks.world > 1 else ''} | "
        f"{cfg.batch_size} rows a step, about {1000 * seconds:.0f} ms | about {memory / 2**30:.1f} GB, "
        f"{duration((total - step) * seconds)} for {total - step:,} steps")

    held_out = data.held_out[: cfg.eval_rows].to(device)
    written = begun = step  # the step whose state is on disk, and where this session began
    busy, clock = 0.0, time.perf_counter()  # seconds of this session's training steps, without evaluations

    with contextlib.ExitStack() as after:  # closes and puts back, however the run ends
        if not ranks.rank:
            runtime.begin_log(path["log"], step)
        stop = []  # filled by Ctrl-C: finish the step, save, leave
        if not quiet or ranks.rank:  # a comparison, which is quiet, is stopped at once
            after.callback(runtime.restore_signals, runtime.on_interrupt(lambda: stop.append(True)))
        bar = after.enter_context(tqdm(initial=step, total=total, disable=None if not quiet else True, unit="step",
                                       dynamic_ncols=True))
        # prepares a batch while the GPU works
        pool = after.enter_context(ThreadPoolExecutor(1)) if device.type == "cuda" else None
        ready = None
        while True:
            used = minutes + (time.perf_counter() - started) / 60
            used, stopped = runtime.agree(ranks, (used, bool(stop)))
            progress = max(step / cfg.max_iters if cfg.max_iters else 0, used / cfg.max_minutes if cfg.max_minutes else 0)
            finished = progress >= 1 and step > 0  # at least one step, however short the time
            done = finished or stopped

            # -- once in a while, and at the end: held-out bound, log, sample, checkpoint; nothing here changes the run
            # a run that was stopped between evaluations and is resumed has steps to evaluate that are on disk already
            evaluate = counted and (step % cfg.eval_interval == 0 or finished)
            save = (counted or step != written) and (step % (cfg.save_interval or cfg.eval_interval) == 0 or done)
            if evaluate or save:
                so_far = runtime.sum_over_ranks(ranks, running)
                check_finite(so_far, model, step, cfg)  # waits for the GPU, so that the clock counts all its work
                busy += time.perf_counter() - clock
            if evaluate:
                model.eval()
                with runtime.autocast(device, dtype):
                    nll, rows_error, _ = diffusion.mean_and_errors(diffusion.bound(
                        judged, held_out, 1, cfg, cfg.micro_batch or 64))
                    sample = "" if quiet else show_sample(judged, data.text, cfg, device)
                model.train()
                loss = so_far.item() / max(1, counted)
                running, so_far, counted = torch.zeros_like(running), torch.zeros_like(running), 0
                if not ranks.rank:
                    runtime.write_line(path["log"], {"step": step, "loss": loss, "bound": nll,
                                                     "bound_se_rows": rows_error, "minutes": used})
                say(f"step {step:,} | training loss {loss:.4f} | held-out bound {nll:.4f} ± {rows_error:.4f} nats a token"
                    f" | {duration(60 * used)}\n    {sample[:300]!r}")
                if nll < best:
                    best = nll
                    if not ranks.rank:
                        checkpoint.save(path["best"], checkpoint.snapshot(
                            cfg, data.text, judged, step, nll, corpus=data.fingerprint))
            if save:
                if not ranks.rank:
                    checkpoint.save(path["last"], checkpoint.snapshot(
                        cfg, data.text, model, step, nll, minutes=used, running=so_far, counted=counted,
                        scaler=scaler.state_dict(), ema=ema.state_dict() if ema else None, corpus=data.fingerprint,
                        job=runtime.torchrun_job(), density=density,
                        optimizers=[optimizer.state_dict() for optimizer in optimizers]))
                written = step
            if done:
                break
            if evaluate or save:
                clock = time.perf_counter()

            # -- a training step
            if measures_density(cfg, step):
                density = measure_density(model, cfg, data, step, ranks, device, dtype)
            pieces, seed = ready.result() if ready else prepare(cfg, data, step, ranks, device, density)
            ready = pool and not measures_density(cfg, step + 1) and pool.submit(
                prepare, cfg, data, step + 1, ranks, device, density)
            loss = gradients(network, cfg, pieces, seed, ranks, device, dtype, token_nll, scaler.scale)
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            if scaler.is_enabled() and not norm.isfinite():
                model.zero_grad()  # float16 overflowed somewhere: no optimizer steps
            scale = optim.lr_scale(cfg, step, progress)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * scale
                scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()
            if ema:
                optim.update_average(ema, model, cfg.ema, step)
            running = running + loss
            step, counted = step + 1, counted + 1
            bar.update()
            if counted % 10 == 0 or device.type == "cpu":  # reading the loss waits for a GPU, so not at every step
                so_far = runtime.sum_over_ranks(ranks, running)
                if not so_far.isfinite():
                    check_finite(so_far, model, step, cfg)
                rate = bar.format_dict["rate"] or 0
                bar.set_postfix_str(f"loss {so_far.item() / counted:.4f}, {rate * tokens_a_step:,.0f} tokens/s")

    runtime.end_ranks(ranks)
    if not finished:
        say(f"stopped at step {step:,}; " + (f"go on with: python train.py --resume {path['last']}" if step else
                                             "nothing was done yet"))
        return {}
    if ranks.rank:
        return {}
    return finish(cfg, data, device, dtype, model.num_parameters(), step, used, busy / max(1, step - begun), path, say)


def check_finite(loss, model, step, cfg):
    """Stop before a broken state is saved."""
    if not (loss.isfinite() and all(p.isfinite().all() for p in model.parameters())):
        raise UserError(f"the loss or a weight is not finite at step {step}; nothing was saved since the last checkpoint. "
                        f"Try a lower --lr ({cfg.lr:g}) and --muon_lr ({cfg.muon_lr:g}), or --dtype float32")


def find_best(cfg, data, device, dtype, path):
    """(held-out metrics, model, step) of the better one of the best checkpoint, which one mask a row decided, and the last,
    whose learning rate has decayed. It becomes the best checkpoint, and says how it was judged."""
    def judge(state):
        model, *_ = checkpoint.restore(state, device, f"the checkpoint of {cfg.name}")
        with runtime.autocast(device, dtype):
            return metrics.held_out(model, cfg, data, device), model

    best, last = (checkpoint.read(path[kind]) for kind in ("best", "last"))
    old, model = judge(best)
    if last["step"] > best["step"]:
        new, newer = judge(last)
        if new["bound_nats_per_token"] < old["bound_nats_per_token"]:
            checkpoint.save(path["best"], checkpoint.snapshot(cfg, data.text, newer, last["step"], last["nll"], corpus=data.fingerprint))
            return new, newer, last["step"]
    today = checkpoint.snapshot(cfg, data.text, model, best["step"], best["nll"], corpus=data.fingerprint)
    if any(today[part] != best[part] for part in ("config", "sample")):  # of a run that was resumed with other settings
        checkpoint.save(path["best"], today)
    return old, model, best["step"]


def finish(cfg, data, device, dtype, parameters, step, minutes, seconds_a_step, path, say):
    """The final metrics block of the best checkpoint, its files, and what to try next; returns the metrics."""
    report, model, best_step = find_best(cfg, data, device, dtype, path)
    if cfg.final_samples:
        report |= metrics.final(model, cfg, data, device, dtype, best_step, cfg.final_samples,
                                sampling=diffusion.sample_options(checkpoint.sample_defaults()))
    rate = cfg.batch_size * cfg.block_size / seconds_a_step if seconds_a_step else None
    report = {"name": cfg.name, "dtype": runtime.dtype_name(dtype), "parameters": parameters, "steps": step, "best_step": best_step, "minutes": minutes,
              "seconds_a_step": seconds_a_step, "tokens_per_second_of_training": rate} | report
    runtime.write_json(path["metrics"], report)
    say(metrics.show(report))
    try:
        plots.loss_curves([path["log"]], path["plot"])
        if "levels" in report:
            plots.levels(report["levels"], cfg.name, path["levels"])
    except ImportError as error:
        say(f"no plots: {error}")
    idle = () if "levels" in report else ("levels",)  # of an earlier run, perhaps
    say("wrote " + ", ".join(file for kind, file in path.items() if kind not in idle and os.path.exists(file)))
    prompt = "" if data.text.is_char or cfg.data != "tales" else ' --prompt "Once upon a time"'
    say(f"next: python inference.py --checkpoint {path['best']}{prompt} --viz-video {cfg.out_dir}/media/trace.mp4")
    return report


def main(argv):
    if "--help" in argv or "-h" in argv:
        return cli.show_help(Config, __doc__)
    if "--list" in argv:
        return config.show_list(diffusion.SAMPLERS, diffusion.SCHEDULES, diffusion.OBJECTIVES)
    if any(word.split("=")[0] == "--resume" for word in argv):
        return train(*checkpoint.resumed_config(argv))
    cfg, why = config.load(argv)
    if path := checkpoint.interrupted(cfg.out_dir, cfg.name):  # torchrun started this run anew
        return train(*checkpoint.resumed_config(["--resume", path]))
    if runtime.is_first():
        print(why)
    train(cfg)


if __name__ == "__main__":
    cli.run(main)
