"""A run of training: what it works with, how it is set up or resumed, and how it ends."""

import copy
import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

import diffusion
from config import Config, SampleConfig
from model import Transformer, count_parameters
from utils import (
    checkpoint,
    cli,
    corpus,
    encoding,
    families,
    importance,
    metrics,
    optim,
    plots,
    ranks,
    runtime,
    tracking,
)
from utils import tokenizer as tokenizers
from utils.built_in import BUILT_IN
from utils.cli import UserError

# seconds of eager CPU training: compiling takes up to a minute, a step is then 1.2 (float32) to 2
# times (bfloat16) as fast
COMPILE_PAYS = 300
# what --init_from must agree on
SHAPE = (
    "n_layer",
    "n_head",
    "n_embd",
    "tie_embeddings",
    "rope_base",
    "softcap",
    "time_conditioning",
)
# and what it is usually to have besides
SUITS = (
    "seq_len",
    "rows",
    "objective",
    "block_len",
    "schedule",
    "corruption",
    "diffusion_steps",
    "loss_weighting",
    "self_conditioning",
    "ar_weight",
)


@dataclass
class Run:
    """What a run works with. Once `choose_network` is done, only the weights and `best` change."""

    cfg: Config
    family: object  # diffusion.Masked, or one of utils/families.py
    data: encoding.Corpus
    hardware: ranks.Hardware
    model: Transformer
    ema: Transformer  # of averaged weights; None without
    optimizers: list
    scaler: torch.amp.GradScaler
    path: dict  # kind of file -> path
    quiet: bool
    best: float = math.inf  # held-out bound of the best checkpoint so far
    network: Callable = None  # the model, compiled and distributed where that pays
    token_nll: Callable = diffusion.token_nll
    seconds: float = 0.0  # of a pass forward and backward
    track: Callable = tracking.nowhere

    def say(self, line):
        """Tell the user."""
        if not self.quiet:
            tqdm.write(line)


# --- the beginning -------------------------------------------------------------------------------


def set_up(cfg, state=None, quiet=False):
    """(Run, Progress) of a new run, or of the one that the checkpoint dict `state` is of."""
    family = families.checked(cfg)
    if not cfg.name:
        raise UserError("the run has no name; give it one with --name")
    if cfg.track != "none":
        tracking.check(cfg.track)
    runtime.keep_memory()
    hardware = ranks.start(cfg.device, cfg.dtype)
    piece = cfg.micro_batch or (2 if cfg.complementary else 1)
    if cfg.batch_size % (hardware.world * piece):
        raise UserError(
            f"batch_size={cfg.batch_size} cannot be shared among {hardware.world} processes"
            + (f" in pieces of {piece} rows" if piece > 1 else "")
        )
    origin = state or (checkpoint.read(cfg.init_from) if cfg.init_from else None)
    with ranks.first_rank_first(hardware):  # it prepares the corpus where need be
        data = corpus.load(cfg, tokenizers.from_json(origin["tokenizer"]) if origin else None)
    check_size(cfg, data.tokenizer.vocab_size, hardware)
    model = make_model(cfg, data.tokenizer, None if state else origin).to(hardware.device)
    ema = copy.deepcopy(model).requires_grad_(False).eval() if cfg.ema else None
    optimizers = optim.make_optimizers(model, cfg, hardware.dtype)
    scaler = torch.amp.GradScaler(hardware.device.type, enabled=hardware.dtype == torch.float16)
    if not state:
        name = hardware.agree(checkpoint.unused_name(cfg.out_dir, cfg.name))
        cfg = dataclasses.replace(cfg, name=name)
    run = Run(
        cfg,
        family,
        data,
        hardware,
        model,
        ema,
        optimizers,
        scaler,
        paths(cfg),
        quiet or hardware.rank > 0,
    )
    progress = checkpoint.Progress(running=torch.zeros((), device=hardware.device))
    if state:
        resume(run, progress, state)
        if os.path.exists(run.path["best"]):
            run.best = checkpoint.read(run.path["best"])["nll"]
    if origin:
        origin.clear()  # frees as much memory as weights and optimizers take
    model.train()
    return run, progress


def paths(cfg):
    """Kind of file -> path of those that a run writes."""
    kinds = {
        "last": ("models", ".pt"),
        "best": ("models", ".best.pt"),
        "log": ("logs", ".jsonl"),
        "metrics": ("logs", ".json"),
        "plot": ("plots", ".loss.png"),
        "levels": ("plots", ".levels.png"),
    }
    return {
        kind: os.path.join(cfg.out_dir, folder, cfg.name + ending)
        for kind, (folder, ending) in kinds.items()
    }


def check_size(cfg, vocab_size, hardware):
    """Complain of a network or a batch that cannot fit into memory, by what they need at least:
    before they take it, since a machine without memory ends a process without a word. (A GPU says
    so itself.)"""
    parameters, kind = count_parameters(cfg, vocab_size), hardware.device.type
    # in float32: weights, gradients and the optimizers' averages; on a GPU they are made on the CPU
    # first
    runtime.check_memory(
        parameters * (4 if kind == "cuda" else 12),
        f"a network of {parameters:,} parameters (n_layer={cfg.n_layer}, n_embd={cfg.n_embd}, "
        f"vocab_size={vocab_size})",
    )
    if kind == "cpu":
        rows = cfg.micro_batch or cfg.batch_size // hardware.world
        # what a backward pass needs of each token: ten bfloat16 activations of a channel in a
        # block, or what a block begins with; the logits, at half of the positions
        a_token = (
            cfg.n_layer * cfg.n_embd * (2 if cfg.activation_checkpointing else 20) + vocab_size
        )
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # that share this machine's memory
        runtime.check_memory(
            processes * rows * cfg.seq_len * a_token,
            f"a pass of {rows} rows of {cfg.seq_len} tokens (micro_batch={cfg.micro_batch}, "
            f"batch_size={cfg.batch_size}, seq_len={cfg.seq_len})",
        )


def make_model(cfg, tokenizer, origin):
    """The network, new or with the weights of the checkpoint dict `origin`, that of --init_from."""
    torch.manual_seed(cfg.seed)
    model = Transformer(cfg, tokenizer.vocab_size)
    if origin:
        theirs = cli.merge(Config, origin["config"])
        table = ("diffusion_steps",) * (cfg.time_conditioning == "table")
        # some of these leave the shapes of the weights alone, so loading would not notice
        for name in SHAPE + table:
            if getattr(cfg, name) != getattr(theirs, name):
                raise UserError(
                    f"--init_from {cfg.init_from} was trained with {name}={getattr(theirs, name)}, "
                    f"not {getattr(cfg, name)}; give --{name} {getattr(theirs, name)}"
                )
        if theirs.self_conditioning and not cfg.self_conditioning:
            share = f"{theirs.self_conditioning:g}"
            raise UserError(
                f"--init_from {cfg.init_from} was trained with self_conditioning={share}; give "
                f"--self_conditioning {share}"
            )
        with checkpoint.fitting(cfg.init_from):
            load_weights(model, origin.get("ema") or origin["model"])
    return model


def load_weights(model, weights):
    """Put weights (a state dict) into a network that may have more tokens, the markers of pairs:
    they come before MASK, and begin as the mean of all tokens; and that may be self-conditioned
    where they are not: an earlier prediction is not heard at first."""
    if model.earlier is not None:
        weights = {"earlier.weight": torch.zeros_like(model.earlier.weight)} | weights
    for name in ("embedding.weight", "head.weight"):
        table, missing = weights[name], model.vocab_size - len(weights[name])
        mean = table[:-1].mean(0, keepdim=True).expand(missing, -1)
        weights = weights | {name: torch.cat((table[:-1], mean, table[-1:]))}
    model.load_state_dict(weights)


def resume(run, progress, state):
    """Put what the checkpoint dict `state` holds into the run."""
    corpus.check_same(run.data, state.get("corpus"), run.cfg)
    with checkpoint.fitting(f"the checkpoint of {run.cfg.name}"):
        for name in vars(progress):
            setattr(progress, name, state.get(name, getattr(progress, name)))
        progress.running = progress.running.reshape(()).to(run.hardware.device) / run.hardware.world
        if progress.density is not None:
            progress.density = progress.density.reshape(importance.BINS)
        run.model.load_state_dict(state["model"])
        if run.ema:
            run.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
            optim.load(optimizer, saved, begun=progress.step > 0 and not state["scaler"])
        if state["scaler"]:  # empty if the run did not use float16 before
            run.scaler.load_state_dict(state["scaler"])


def choose_network(run, progress, one_pass):
    """Put into `run` the network that trains it, compiled where that pays, and the seconds of a
    step forward and backward, of which one_pass(network, token_nll) does one."""
    cfg, hardware, kind = run.cfg, run.hardware, run.hardware.device.type
    timed = lambda network, token_nll: min([one_pass(network, token_nll) for _ in range(4)][2:])
    seconds, compiled = None, None
    wanted = cfg.compile == "on" or cfg.compile == "auto" and kind == "cuda"
    if not wanted:
        seconds = hardware.agree(timed(run.model, run.token_nll))
        session = ((cfg.max_iters or math.inf) - progress.step) * seconds
        if cfg.max_minutes:
            session = min(session, 60 * (cfg.max_minutes - progress.minutes))
        wanted = cfg.compile == "auto" and kind == "cpu" and session > COMPILE_PAYS
    if wanted:
        compiled = runtime.compile_network(run.model, run.token_nll, hardware.device, timed)
        if hardware.sum(torch.tensor(float(compiled is None))):  # all compile, or none
            compiled = None
    network, run.token_nll, seconds = compiled or (
        run.model,
        run.token_nll,
        seconds or timed(run.model, run.token_nll),
    )
    run.network, run.seconds = ranks.distribute(network, hardware), hardware.agree(seconds)
    # what auto meant is kept, so that a resumed run decides the same
    run.cfg = dataclasses.replace(
        cfg,
        device=kind,
        dtype=runtime.dtype_name(hardware.dtype),
        compile="on" if compiled else "off",
    )
    run.family = families.family_of(run.cfg)


def introduce(run, progress, minutes):
    """Say what is trained, where, and how long it takes; returns the steps of the whole run.
    minutes: done so far, those of setting up included."""
    cfg, data, hardware = run.cfg, run.data, run.hardware
    total = cfg.max_iters or math.inf
    if cfg.max_minutes:
        left = 60 * (cfg.max_minutes - minutes)
        total = min(total, progress.step + max(1, int(left / run.seconds)))
    parameters, steps = run.model.num_parameters(), total - progress.step
    memory = runtime.peak_memory(hardware.device) + 8 * parameters  # and the optimizers' averages
    fresh = f"fresh {BUILT_IN[cfg.data].nouns} every step" if cfg.data in BUILT_IN else ""
    tokens = fresh or f"{data.tokens:,} training tokens"
    run.say(
        f"{cfg.name}: {parameters:,} parameters, vocabulary {data.tokenizer.vocab_size:,} | "
        f"{tokens}, {len(data.held_out):,} held-out rows of {cfg.seq_len}"
    )
    run.say(
        f"{cfg.device} {cfg.dtype}{', compiled' if cfg.compile == 'on' else ''}"
        f"{f', {hardware.world} processes' if hardware.world > 1 else ''} | "
        f"{cfg.batch_size} rows a step, about {1000 * run.seconds:.0f} ms | about "
        f"{memory / 2**30:.1f} GB, "
        f"{cli.duration(steps * run.seconds)} for {steps:,} steps"
    )
    return total


# --- the end -------------------------------------------------------------------------------------


def find_best(run):
    """(held-out metrics, model, step) of the better one of the best checkpoint, which one mask a
    row decided, and the last, whose learning rate has decayed. It becomes the best checkpoint, and
    says how it was judged."""

    def judge(state):
        model, *_ = checkpoint.restore(
            state, run.hardware.device, f"the checkpoint of {run.cfg.name}"
        )
        with run.hardware.autocast():
            return metrics.held_out(model, run.family, run.data, run.hardware.device), model

    best, last = (checkpoint.read(run.path[kind]) for kind in ("best", "last"))
    (found, model), state = judge(best), best
    if last["step"] > best["step"]:
        newer, other = judge(last)
        if newer["bound_nats_per_token"] < found["bound_nats_per_token"]:
            found, model, state = newer, other, last
    today = checkpoint.snapshot(run.cfg, run.data, model, state["step"], state["nll"])
    # or it is of a run that was resumed with other settings
    if state is last or any(today[part] != best[part] for part in ("config", "sample")):
        checkpoint.save(run.path["best"], today)
    return found, model, state["step"]


def finish(run, progress, seconds_a_step):
    """The final metrics block of the best checkpoint, its files, and what to try next; returns the
    metrics."""
    cfg, path, data, say = run.cfg, run.path, run.data, run.say
    report, model, best_step = find_best(run)
    if cfg.final_samples:
        report |= metrics.final(
            model, run.family, data, run.hardware, best_step, cfg.final_samples, SampleConfig()
        )
    rate = cfg.batch_size * cfg.seq_len / seconds_a_step if seconds_a_step else None
    report = {
        "name": cfg.name,
        "dtype": cfg.dtype,
        "parameters": run.model.num_parameters(),
        "steps": progress.step,
        "best_step": best_step,
        "minutes": progress.minutes,
        "seconds_a_step": seconds_a_step,
        "tokens_per_second_of_training": rate,
    } | report
    if cfg.rows == "stream" and data.tokens:  # not fresh texts every step
        report["passes_over_the_text"] = progress.step * cfg.batch_size * cfg.seq_len / data.tokens
    runtime.write_json(path["metrics"], report)
    say(metrics.show(report))
    try:
        plots.loss_curves([path["log"]], path["plot"])
        if "levels" in report:
            plots.levels(report["levels"], cfg.name, path["levels"])
    except ImportError as error:
        say(f"no plots: {error}")
    idle = () if "levels" in report else ("levels",)  # of an earlier run, perhaps
    files = [file for kind, file in path.items() if kind not in idle and os.path.exists(file)]
    say("wrote " + ", ".join(files))
    words = BUILT_IN[cfg.data].prompt if cfg.data in BUILT_IN else ""
    prompt = f' --prompt "{words}"' if words and not data.tokenizer.is_char else ""
    say(
        f"next: python inference.py --checkpoint {path['best']}{prompt} --viz-video "
        f"{cfg.out_dir}/media/trace.mp4"
    )
    return report
