"""Time of a training step: `scripts/lab/bench.py train`, which runs it."""

import contextlib
import dataclasses
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import time
from functools import partial

import torch

import config
import diffusion
import train
from config import Config
from model import Transformer
from utils import cli, corpus, encoding, families, optim, ranks, runtime, settings
from utils.cli import UserError

SOURCE = "the micro-dLLMs' recipe, float32 eager"


def training_step(cfg, vocab_size, device, dtype=torch.float32, compiled=False, torchs_muon=False):
    """(function that does one training step of `cfg`, with train.py's code, optimizer included, and
    returns how many positions are scored; parameters). On random tokens, but where cfg.data is a
    folder of shards."""
    torch.manual_seed(0)
    model = Transformer(cfg, vocab_size).to(device).train()
    family = families.family_of(cfg)
    optimizers, hardware = optim.make_optimizers(model, cfg, dtype), ranks.Hardware(device, dtype)
    numbers = itertools.count()
    if torchs_muon:
        optimizers[1] = torch.optim.Muon(optimizers[1].param_groups[0]["params"], cfg.muon_lr)
    if os.path.isdir(cfg.data):
        data = corpus.load(cfg)
    else:
        x0 = torch.randint(vocab_size - 1, (cfg.batch_size, cfg.seq_len))
        data = encoding.Corpus(lambda step, rows: x0[rows], None, None, 0, "", None)

    def step(network, token_nll=diffusion.token_nll):
        batch = train.draw_batch(family, data, next(numbers), hardware)
        train.gradients(network, family, batch, hardware, token_nll)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        runtime.synchronise(device)
        if cfg.loss_weighting == "full":
            return cfg.batch_size * cfg.seq_len
        return sum(len(corruption.index) for _, corruption in batch[0])

    if compiled:
        compiled = runtime.compile_network(model, diffusion.token_nll, device, step)
        if not compiled:
            raise UserError(
                "torch.compile does not work here: nothing compiled to time; choose with --variants"
            )
    network, token_nll, _ = compiled or (model, diffusion.token_nll, None)
    return partial(step, network, token_nll), model.num_parameters()


def serve(pipe, keep_memory, *setting):
    """A process of its own for each variant, so that none profits or suffers from another's memory:
    does as many steps as it is told after one that does not count, since the others' turns have
    emptied the caches, and sends their median seconds, positions scored, parameters, and peak
    memory so far."""
    if keep_memory:
        runtime.keep_memory()
    try:
        step, parameters = training_step(*setting)
        while steps := pipe.recv():
            times = []
            for _ in range(1 + steps):
                start = time.perf_counter()
                scored = step()
                times.append(time.perf_counter() - start)
            pipe.send(
                (statistics.median(times[1:]), scored, parameters, runtime.peak_memory(setting[2]))
            )
    except (UserError, RuntimeError) as error:  # a GPU's memory that is too small, say
        pipe.send(cli.reason(error))
    except EOFError:  # the process that asks has ended
        pass


class Variant:
    """A process that runs `serve`."""

    def __init__(self, label, *setting):
        self.label, context = label, multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, *setting), daemon=True)
        self.process.start()
        there.close()

    def turn(self, steps):
        try:
            self.pipe.send(steps)
            answer = self.pipe.recv()
        except (EOFError, OSError):
            answer = "its process died; it may lack memory"
        if isinstance(answer, str):
            raise UserError(f"{self.label}: {answer}")
        return answer

    def end(self):
        with contextlib.suppress(OSError):  # it has died
            self.pipe.send(0)
        self.process.join()


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seconds_of(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def matrix_rate(device, dtype, size):
    """FLOP/s of size x size matrix products, from the median of five."""
    a = torch.randn(size, size, device=device, dtype=dtype)

    def product():
        a @ a
        runtime.synchronise(device)

    product()
    return 2 * size**3 / statistics.median(seconds_of(product) for _ in range(5))


def model_flops(cfg, vocab_size, scored):
    """FLOPs of a forward and backward pass of a batch: 6 a parameter of the blocks and token,
    attention; the last block's MLP and projections, and the head, at the `scored` positions alone;
    nothing for embeddings, norms or what is computed twice."""
    tokens = cfg.batch_size * cfg.seq_len
    blocks = sum(p.numel() for p in Transformer(cfg, vocab_size).blocks.parameters())
    attention = 12 * cfg.n_layer * cfg.n_embd * cfg.seq_len
    last = 9 * cfg.n_embd**2  # parameters of the last block that see what is scored
    return (6 * (blocks - last) + attention) * tokens + 6 * (
        last + cfg.n_embd * (vocab_size - 1)
    ) * scored


def matrices(device, dtype):
    """(dtype, size) of the matrix products that a training step is measured against."""
    return dtype, 8192 if device.type == "cuda" else 2048


def training_variants(cfg, dtype):
    """Label -> (whether memory is kept, Config, dtype, whether compiled, whether with
    torch.optim.Muon), in order."""
    shape = {
        name: getattr(cfg, name)
        for name in ("n_layer", "n_head", "n_embd", "seq_len", "micro_batch")
    }
    # head and loss at all positions
    recipe = cli.merge(Config, config.MICRO, shape, {"loss_weighting": "full"})
    label, full = runtime.dtype_name(dtype), torch.float32
    variants = {
        SOURCE: (False, recipe, full, False, False),
        "the same, memory kept": (True, recipe, full, False, False),
        "float32 eager": (True, cfg, full, False, False),
        "float32 compiled": (True, cfg, full, True, False),
    }
    if dtype != full:
        variants |= {
            f"{label} eager": (True, cfg, dtype, False, False),
            f"{label} compiled": (True, cfg, dtype, True, False),
        }
    if cfg.optimizer == "muon":
        variants[f"{label} compiled, torch.optim.Muon"] = (True, cfg, dtype, True, True)
    return variants


def time_together(variants, vocab_size, device, products, options):
    """(label -> list of answers of `serve`, one a round; median FLOP/s of matrix products), all in
    turn, each for the rows of the largest step."""
    processes = [
        Variant(label, keep, cfg, vocab_size, device, *rest)
        for label, (keep, cfg, *rest) in variants.items()
    ]
    answers, rates = {label: [] for label in variants}, []
    most = max(cfg.batch_size for _, cfg, *_ in variants.values())
    try:
        for number in range(options.rounds + options.warm_up):
            rates.append(matrix_rate(device, *products))
            for process in processes:
                answers[process.label].append(
                    process.turn(most // variants[process.label][1].batch_size)
                )
    finally:
        for process in processes:
            process.end()
    timed = {label: rows[options.warm_up :] for label, rows in answers.items()}
    return timed, statistics.median(rates[options.warm_up :])


def figures_of(variant, vocab_size, rows, rate, speed_up):
    """Figures (dict) of a variant, from the answers of `serve` (rows, one a round)."""
    cfg, seconds = variant[1], statistics.median(row[0] for row in rows)
    flops = model_flops(cfg, vocab_size, rows[-1][1]) / seconds
    return {
        "rows_a_step": cfg.batch_size,
        "median_step_seconds": seconds,
        "tokens_per_second": cfg.batch_size * cfg.seq_len / seconds,
        "speed_up": speed_up,
        "model_flops_per_second": flops,
        "matrix_product_flops_per_second": rate,
        "share_of_matrix_rate": flops / rate,
        "peak_memory_gb": rows[-1][3] / 2**30,
        "parameters": rows[-1][2],
    }


def bench_train(name, options):
    """Figures (dict) for one preset: the micro-dLLMs' recipe, and what this machine's own choices
    give, step by step."""
    cfg = dataclasses.replace(cli.merge(Config, settings.preset(name)), short_rows=0.0)
    device = runtime.choose_device(options.device)
    dtype = runtime.choose_dtype("auto", device)
    # of Tiny Shakespeare, or what BPE is trained to
    vocab_size = 66 if cfg.tokenizer == "char" else cfg.vocab_size
    variants, figures = training_variants(cfg, dtype), {}
    products = matrices(device, dtype)
    labels = [label for label in variants if label != SOURCE and options.variants in label]
    if not labels:
        raise UserError(
            f"variants={options.variants}: no variant's name holds this; known: "
            f"{', '.join(variants)}"
        )
    tokens = lambda label: variants[label][1].batch_size * variants[label][1].seq_len
    own, timed = f"{runtime.dtype_name(dtype)} compiled", {}
    for label in [SOURCE, *labels] if device.type == "cuda" else labels:
        # beside the micro-dLLMs' recipe, since a machine's speed drifts (torch's Muon beside ours,
        # from which it hardly differs); alone on a GPU, which may lack memory for both
        reference = own if label == f"{own}, torch.optim.Muon" and own in figures else SOURCE
        group = [label] if device.type == "cuda" else [reference, label]
        try:
            answers, rate = time_together(
                {one: variants[one] for one in group}, vocab_size, device, products, options
            )
        except UserError as error:  # a GPU's memory that is too small for one may do for the others
            failed = error
            print(f"left out: {error}", file=sys.stderr)
            continue
        for one, rows in answers.items():
            timed.setdefault(one, []).extend(rows)
        base = answers.get(reference) or timed.get(reference)
        known = 1.0 if reference == SOURCE else figures[reference]["speed_up"]
        for one, rows in answers.items():
            if one in figures:  # the reference, shown over all its pairs
                speed_up = figures[one]["speed_up"]
            else:
                ratio = base and statistics.median(a[0] / b[0] for a, b in zip(base, rows))
                speed_up = ratio and known and known * ratio * tokens(one) / tokens(reference)
            figures[one] = figures_of(variants[one], vocab_size, timed[one], rate, speed_up)
    if not figures:
        raise failed
    return {
        "preset": name,
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seq_len": cfg.seq_len,
        "vocab_size": vocab_size,
        "rounds": options.rounds,
        "matrix_product_dtype": runtime.dtype_name(dtype),
        "matrix_product_size": products[1],
        "variants": figures,
    }


def show_train(report):
    size = report["matrix_product_size"]
    print(
        f"{report['preset']} on {report['device']}, {report['threads']} threads; shares are of the "
        f"rate of {report['matrix_product_dtype']} matrix products, {size} x {size} x {size}"
    )
    for label, f in report["variants"].items():
        print(
            f"  {label:<38} {f['rows_a_step']:4} rows {f['median_step_seconds'] * 1000:8.0f} ms a "
            f"step {f['tokens_per_second']:10,.0f} tokens/s  x{f['speed_up'] or math.nan:.2f} "
            f"{f['model_flops_per_second'] / 1e9:10,.0f} of "
            f"{f['matrix_product_flops_per_second'] / 1e9:,.0f} GFLOP/s "
            f"{f['share_of_matrix_rate']:6.1%} {f['peak_memory_gb']:6.1f} GB"
        )
