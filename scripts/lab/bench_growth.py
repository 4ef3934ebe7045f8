"""How seconds and memory of a training step grow: `scripts/lab/bench.py growth`, which runs it."""

import dataclasses
import os
import tempfile

import numpy as np
import torch

from config import Config
from scripts.lab import bench_training
from utils import cli, runtime, settings, shards
from utils import tokenizer as tokenizers

# setting of config.py -> its values; all others are the preset's. Heads of 64 channels.
VALUES = {
    "seq_len": (64, 128, 256, 512, 1024),
    "batch_size": (4, 8, 16, 32, 64),
    "n_embd": (64, 128, 256, 512, 1024),
    "data": (10**6, 10**7, 10**8),  # tokens, as shards
}
LAST = 3  # values that an exponent is fitted to: small ones are all overhead
# of a step that needs next to nothing: Python, torch and the compiler take the rest
FLOOR = dict(seq_len=16, batch_size=1, n_embd=64, n_head=1)


def random_shards(folder, tokens, tokenizer):
    """A folder of shards of that many random tokens, as `shards.write_shards` lays them out."""
    index = shards.begin_index(folder, tokenizer, {})
    sizes = [min(shards.SHARD_TOKENS, tokens - at) for at in range(0, tokens, shards.SHARD_TOKENS)]
    for number, size in enumerate(sizes):
        shard = {"name": f"{number:05d}.bin", "train": size, "held_out": 10**4}
        for part in ("train", "held_out"):
            ids = np.random.default_rng(number).integers(tokenizer.mask, size=shard[part])
            ids.astype(index["dtype"]).tofile(os.path.join(folder, f"{part}_{shard['name']}"))
        index["shards"].append(shard)
    runtime.write_json(os.path.join(folder, "index.json"), index | {"tokens": tokens})
    return folder


def configs_of(setting, cfg, folder, tokenizer):
    """Value of the setting -> Config."""
    configs = {}
    for value in VALUES[setting]:
        changes = {setting: value}
        if setting == "data":
            changes["data"] = random_shards(os.path.join(folder, str(value)), value, tokenizer)
        if setting == "n_embd":
            changes["n_head"] = value // 64
        configs[value] = dataclasses.replace(cfg, **changes)
    return configs


def exponents(rows, setting):
    """{figure: p of the power law cost = c * value^p} of the last LAST rows of a setting, by least
    squares of the logarithms."""
    own = [row for row in rows if row["setting"] == setting][-LAST:]
    x = np.log([row["value"] for row in own])
    slope = lambda what: float(np.polyfit(x, np.log([row[what] for row in own]), 1)[0])
    return {what: slope(what) for what in ("median_step_seconds", "step_memory_gb")}


def bench_growth(name, options):
    """Figures (dict) for one preset: seconds of a training step and the peak memory of its process,
    compiled, over the window, the rows of a step, the width, and the size of the corpus. All values
    of one are timed in turn, each in a process of its own. step_memory_gb: what is beyond that of
    the process with the smallest step, FLOOR."""
    cfg = cli.merge(Config, settings.preset(name))
    # masks of the whole window: blocks compute two rows for one
    plain = dict(rows="stream", short_rows=0.0, block_len=0)
    cfg = dataclasses.replace(cfg, **plain, final_rows=16, eval_rows=16)
    device = runtime.choose_device(options.device)
    dtype = runtime.choose_dtype("auto", device)
    tokenizer = tokenizers.train_bpe(["a"], 258)  # of bytes: the tokens are random anyway
    rows, products = [], bench_training.matrices(device, dtype)
    variant_of = lambda one: (True, one, dtype, True, False)
    together = lambda variants: bench_training.time_together(
        variants, cfg.vocab_size, device, products, options
    )
    smallest = variant_of(dataclasses.replace(cfg, **FLOOR))
    answers, rate = together({0: smallest})
    figures = bench_training.figures_of(smallest, cfg.vocab_size, answers[0], rate, None)
    floor = figures["peak_memory_gb"]
    with tempfile.TemporaryDirectory() as folder:
        for setting in VALUES:  # as few processes at a time as that takes
            configs = configs_of(setting, cfg, folder, tokenizer)
            variants = {value: variant_of(one) for value, one in configs.items()}
            answers, rate = together(variants)
            for value, variant in variants.items():
                figures = bench_training.figures_of(
                    variant, cfg.vocab_size, answers[value], rate, None
                )
                memory = {"step_memory_gb": figures["peak_memory_gb"] - floor}
                rows.append({"setting": setting, "value": value} | figures | memory)
    return {
        "preset": name,
        "device": bench_training.device_name(device),
        "dtype": runtime.dtype_name(dtype),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "floor_gb": floor,
        "rows": rows,
        "exponents": {setting: exponents(rows, setting) for setting in VALUES},
    }


def show_growth(report):
    print(
        f"{report['preset']} on {report['device']} {report['dtype']} compiled, "
        f"{report['threads']} threads"
    )
    for row in report["rows"]:
        print(
            f"  {row['setting']:<10} {row['value']:11,} "
            f"{1000 * row['median_step_seconds']:8.0f} ms "
            f"{row['tokens_per_second']:10,.0f} tokens/s {row['share_of_matrix_rate']:6.1%} of the "
            f"matrix rate {row['peak_memory_gb']:6.2f} GB"
        )
    for setting, found in report["exponents"].items():
        print(
            f"  grows with {setting}: seconds as its power {found['median_step_seconds']:z.2f}, "
            f"memory {found['step_memory_gb']:z.2f}"
        )
