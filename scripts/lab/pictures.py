"""The pictures of learning.md, and those of the results page that no comparison draws, into
artifacts/plots: each a function and an entry of PICTURES.

# all; some; with a checkpoint
python scripts/lab/pictures.py
python scripts/lab/pictures.py schedules weights
python scripts/lab/pictures.py samplers_at_work --checkpoint artifacts/models/tales.best.pt
"""

import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import torch

import diffusion
from config import DEVICES, SampleConfig
from model import waves
from scripts.lab import compare_samplers, results
from utils import blocks, canvas, cli, families, plots, policies, runtime, tales
from utils.cli import field


@dataclass(frozen=True)
class PictureConfig:
    checkpoint: str = field("", "of samplers_at_work (default: the newest run's best)", "what")
    out_dir: str = field("artifacts/plots", "where to write")
    device: str = field("cpu", "of samplers_at_work", choices=DEVICES)

    def __post_init__(self):
        cli.check(self)


def schedules(options, path):
    """m(t) of every schedule."""
    figure, axis = plots.pyplot().subplots(figsize=(6, 4), layout="constrained")
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    for number, name in enumerate(diffusion.SCHEDULES):
        axis.plot(t, diffusion.mask_ratio(name, t), color=plots.OKABE_ITO[number % 7], label=name)
    axis.set(xlabel="time t", ylabel="mask ratio m(t)", xlim=(0, 1), ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend()
    plots.save(figure, path)


def weights(options, path):
    """The weight omega(m) that the mean over masked tokens gives to each mask ratio, and the
    bound's, which is 1."""
    figure, axis = plots.pyplot().subplots(figsize=(6, 4), layout="constrained")
    m = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1]
    axis.axhline(1, color=plots.OKABE_ITO[-1], lw=2, label="the bound, whatever the schedule")
    for number, name in enumerate(("linear", "cos", "cos2", "cos2_s008")):
        # m times the density of shares
        weight = m / diffusion.mask_ratio_slope(name, diffusion.time_of(name, m))
        # cos2 and cos2_s008 nearly coincide
        axis.plot(
            m,
            weight / (weight.sum() / len(m)),
            color=plots.OKABE_ITO[number],
            ls=("-", "--", "-", ":")[number],
            lw=4 if name == "cos2" else 1.5,
            label=f"mean over masked tokens, {name}",
        )
    axis.set(
        xlabel="mask ratio m",
        ylabel="weight of a masked token's cross entropy",
        xlim=(0, 1),
        ylim=(0, 4),
    )
    axis.grid(alpha=0.3)
    axis.legend()
    plots.save(figure, path)


def masking(options, path):
    """A sentence at t = 0 ... 1, under two schedules, masked by the same random numbers."""
    words = tales.generate("picture", 1)[0].split()[:20]
    u = torch.rand(len(words), generator=runtime.generator("picture"))
    figure, axes = plots.pyplot().subplots(2, 1, figsize=(9.5, 4.2), layout="constrained")
    times = torch.linspace(0, 1, 6, dtype=torch.float64)
    for axis, name in zip(axes, ("linear", "cos")):
        for line, (t, m) in enumerate(
            zip(times.tolist(), diffusion.mask_ratio(name, times).tolist())
        ):
            text = " ".join(
                "▢" * len(word) if masked else word for word, masked in zip(words, (u < m).tolist())
            )
            axis.text(
                0,
                -line,
                f"t = {t:.1f}  m = {m:.2f}   {text}",
                family="DejaVu Sans Mono",
                fontsize=8,
                va="center",
            )
        axis.set(xlim=(0, 1), ylim=(-len(times) + 0.5, 0.8))
        axis.set_title(f"schedule {name}", loc="left", fontsize=10)
        axis.axis("off")
    plots.save(figure, path)


def replacing(options, path):
    """A sentence under uniform noise: what is replaced (orange) becomes any word, and nothing but
    the colour shows it."""
    anything = sorted(set(" ".join(tales.generate("picture", 200)).split()))
    words = tales.generate("picture", 1)[0].split()[:14]
    generator = runtime.generator("picture")
    u = torch.rand(len(words), generator=generator)
    other = torch.randint(len(anything), (len(words),), generator=generator)
    figure, axis = plots.pyplot().subplots(figsize=(8, 2), layout="constrained")
    for line, m in enumerate((0.0, 0.2, 0.4, 0.6, 0.8, 1.0)):
        row = [(f"m = {m:.1f}  ", "black")] + [
            (anything[number], plots.OKABE_ITO[4]) if masked else (word, "black")
            for word, number, masked in zip(words, other.tolist(), (u < m).tolist())
        ]
        for place, (word, colour) in enumerate(row):
            column = sum(len(before) + 1 for before, _ in row[:place])
            axis.text(
                column,
                -line,
                word,
                family="DejaVu Sans Mono",
                fontsize=8,
                va="center",
                color=colour,
            )
    axis.set(xlim=(0, 8 * 72 / (8 * 0.602)), ylim=(-5.5, 0.5))  # a column is as wide as a letter
    axis.axis("off")
    plots.save(figure, path)


def attention(options, path):
    """Who sees whom: the masks of the four families, for eight tokens."""
    size, cpu = 8, torch.device("cpu")
    everyone = torch.ones(size, size, dtype=torch.bool)
    ids = blocks.block_ids(size, 4, 0, cpu)
    panels = (
        ("masked, uniform\nall see all", everyone),
        ("autoregressive\nwhat is to the left", everyone.tril()),
        ("blocks of 4, generating\nits block and those before", ids[None] <= ids[:, None]),
        ("blocks of 4, training\n[corrupted | clean] twice", blocks.doubled_mask(size, 4, 0, cpu)),
    )
    figure, axes = plots.pyplot().subplots(1, 4, figsize=(11, 3.2), layout="constrained")
    for axis, (title, mask) in zip(axes, panels):
        edges = [i - 0.5 for i in range(len(mask) + 1)]
        axis.imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1.4)
        axis.set_title(title, fontsize=9)
        axis.set(xticks=edges, yticks=edges, xlabel="is seen", ylabel="sees")
        axis.tick_params(length=0, labelbottom=False, labelleft=False)
        axis.grid(color="white")
    plots.save(figure, path)


def time_embedding(options, path):
    """What a time-conditioned network is told: sines and cosines of the noise level."""
    figure, axis = plots.pyplot().subplots(figsize=(8, 3), layout="constrained")
    shown = axis.imshow(
        waves(torch.linspace(0, 1, 101), 64).numpy(),
        aspect="auto",
        cmap="RdBu",
        extent=(0, 64, 1, 0),
    )
    axis.set(xlabel="channel (32 sines, 32 cosines)", ylabel="noise level m")
    figure.colorbar(shown)
    plots.save(figure, path)


def samplers_at_work(options, path):
    """Who gets revealed when: a story by every sampler, steps from top to bottom, tokens from left
    to right."""
    device = runtime.choose_device(options.device)
    model, tokenizer, cfg, _ = compare_samplers.model_of(options.checkpoint, device)
    compare_samplers.check_masked(families.family_of(cfg))
    blank = torch.tensor([canvas.build(tokenizer, [None], cfg.seq_len)], device=device)
    height = -(-len(policies.SAMPLERS) // 4)
    figure, axes = plots.pyplot().subplots(
        height, 4, figsize=(12, 2.5 * height), layout="constrained"
    )
    colours = {
        "masked": (0.2, 0.25, 0.33),
        "unmasked": (0.84, 0.9, 0.96),
        "fresh": (1.0, 0.75, 0.2),
        "masked again": (0.8, 0.2, 0.2),
    }
    for axis, name in zip(axes.flat, policies.SAMPLERS):
        states = []
        how = SampleConfig(sampler=name, steps=32)
        for step in diffusion.sample(families.family_of(cfg), model, blank, how, seeds=[1]):
            state = torch.tensor(colours["unmasked"]).repeat(cfg.seq_len, 1)
            for kind, where in (
                ("masked", step.masked),
                ("fresh", step.fresh),
                ("masked again", step.remasked),
            ):
                state[where[0].cpu()] = torch.tensor(colours[kind])
            states.append(state)
        axis.imshow(torch.stack(states).numpy(), aspect="auto", interpolation="nearest")
        axis.set_title(f"{name}: {int(step.row_nfe[0])} NFE", fontsize=9)
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set(ylabel="steps, downwards", xlabel="tokens")
    handles = [
        plots.pyplot().Rectangle((0, 0), 1, 1, color=colour, label=kind)
        for kind, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    plots.save(figure, path)


def growth(options, path):
    """Seconds and memory of a training step over window, rows, width and corpus, as scripts/lab/
    bench.py growth measured them."""
    [report] = results.load("benchmarks/growth_cpu.json")
    figure, axes = plots.pyplot().subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    names = dict(seq_len="window", batch_size="rows", n_embd="width", data="tokens of the corpus")
    for number, (setting, exponents) in enumerate(report["exponents"].items()):
        rows = [row for row in report["rows"] if row["setting"] == setting]
        times = [row["value"] / rows[0]["value"] for row in rows]
        for axis, what in zip(axes, ("median_step_seconds", "step_memory_gb")):
            axis.plot(
                times,
                [row[what] for row in rows],
                "o-",
                color=plots.OKABE_ITO[number],
                label=f"{names[setting]}, from {rows[0]['value']:,}: {exponents[what]:z.2f}",
            )
    for axis, what in zip(axes, ("seconds a step", "GB beyond the smallest step")):
        axis.set(xlabel="times the smallest value", ylabel=what, xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(title="exponent", fontsize=8)
    plots.save(figure, path)


def hours(options, path):
    """Held-out bound and training loss of `stories_small` over 12,500 steps, without dropout
    (stopped at 8,500) and with, from the runs' logs."""
    names = ("hours", "hours_dropout")
    folder = os.path.join(results.ROOT, "artifacts/benchmarks")
    plots.loss_curves([os.path.join(folder, f"{name}.jsonl") for name in names], path)


PICTURES = {
    picture.__name__: picture
    for picture in (
        schedules,
        weights,
        masking,
        replacing,
        attention,
        time_embedding,
        samplers_at_work,
        growth,
        hours,
    )
}


def run(names, overrides):
    for name in names:
        cli.check_name("picture", name, PICTURES)
    options = cli.merge(PictureConfig, overrides)
    for name in names or PICTURES:
        path = os.path.join(options.out_dir, f"{name}.png")
        PICTURES[name](options, path)
        print(f"wrote {path}")


main = cli.command(PictureConfig, run, __doc__)
if __name__ == "__main__":
    cli.run(main)
