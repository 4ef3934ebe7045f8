"""Judge a checkpoint: its held-out bound, and on tales whether its samples are stories.

    python scripts/evaluate.py                                      the newest run's best checkpoint
    python scripts/evaluate.py --checkpoint artifacts/models/tales.best.pt --num_samples 200 --json report.json
"""
import dataclasses
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import diffusion
from config import Config, SampleConfig
from utils import canvas, checkpoint, cli, corpus, metrics, runtime
from utils.cli import UserError, field


@dataclass(frozen=True)
class EvaluateConfig:
    checkpoint: str = field("", "path (default: the newest run's best)", "what")
    num_samples: int = field(200, "unconditional samples, seeds 0, 1, ... (tales only)")
    rows: int = field(None, "held-out rows (default: the run's final_rows)")
    json: str = field("", "write the report to this file too")
    sampler: str = field(SampleConfig.sampler, "rule that picks what to write next", "how")
    steps: int = field(None, "most steps (default: as many as there are tokens to write)")
    temperature: float = field(SampleConfig.temperature, "of the token distribution")
    top_p: float = field(SampleConfig.top_p, "draw from the likeliest tokens that sum to this (1: all)")
    device: str = field("auto", "auto: cuda, else mps, else cpu", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = field("auto", "of matrix products", choices=("auto", "float32", "bfloat16", "float16"))

    def __post_init__(self):
        cli.check_choices(self)
        for name in ("num_samples", "rows", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        diffusion.find_sampler(self.sampler)
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"temperature={self.temperature} must not be negative, and top_p={self.top_p} in (0, 1]")


def judge_samples(model, text, cfg, data, options, steps, device):
    """Validity of samples under the grammar, and copies from the stories that the run was trained on."""
    def write(blank, seeds):
        *_, last = diffusion.sample(model, blank, sampler=options.sampler, steps=options.steps,
                                    temperature=options.temperature, top_p=options.top_p, seeds=seeds)
        return last.ids, last.row_evaluations
    rows, evaluations = metrics.sample_rows(write, text, cfg, options.num_samples, device)
    report = metrics.judge_tales([story for row in rows.tolist() for story in canvas.documents(text, row, cfg.rows)])
    known = torch.cat([data.batch(step) for step in range(steps)]).int()
    # real stories share runs with the training set too: what the held-out ones share is chance
    copies, chance = metrics.longest_copies(torch.cat((rows, data.held_out)), known).split([len(rows), len(data.held_out)])
    return report | {"sampler": options.sampler, "temperature": options.temperature, "top_p": options.top_p,
                     "evaluations_a_sample": evaluations.float().mean().item(),
                     "longest_copy_mean": copies.float().mean().item(), "longest_copy_max": copies.max().item(),
                     "held_out_copy_mean": chance.float().mean().item(),
                     "held_out_copy_max": chance.max().item(), "held_out_copies_of": len(chance)}


def main(argv):
    if "--help" in argv or "-h" in argv:
        return cli.show_help(EvaluateConfig, __doc__)
    positional, overrides = cli.parse(argv, EvaluateConfig)
    if positional:
        raise UserError(f"what is {positional[0]}? Name the model with --checkpoint {positional[0]}")
    options = cli.merge(EvaluateConfig, overrides)
    path = options.checkpoint or checkpoint.newest(os.path.join(Config.out_dir, "models"))
    state, device = checkpoint.read(path), runtime.choose_device(options.device)
    model, text, cfg = checkpoint.restore(state, device, path)
    cfg = dataclasses.replace(cfg, final_rows=options.rows or cfg.final_rows)
    data = corpus.load(cfg, text)
    with runtime.autocast(device, runtime.choose_dtype(options.dtype, device)):
        report = {"checkpoint": path, "step": state["step"]} | metrics.held_out(model, cfg, data, device)
        if cfg.data == "tales":
            report |= judge_samples(model, text, cfg, data, options, state["step"], device)
    print(metrics.show(report))
    if options.json:
        runtime.write_json(options.json, report)


if __name__ == "__main__":
    cli.run(main)
