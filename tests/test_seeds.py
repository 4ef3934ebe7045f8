"""The same seed, the same text: what every sampler generates, step by step, recorded in seeds.json.

    python tests/test_seeds.py    records anew, where texts change on purpose

The networks are in float64, so that no choice hangs on the last digit of a machine's products.
"""

import hashlib
import itertools
import json
import os
import sys

import torch

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(FOLDER), FOLDER]

import test_maths
import test_uniform
import toy

from utils import cli, policies

PATH = os.path.join(FOLDER, "seeds.json")
LOOKS = ("threshold:0.5", "remdm_cap:0.4", "local_entropy:2", *policies.SAMPLERS)


def masked_cases():
    """On the toy, one canvas of each number of masks."""
    for sampler in LOOKS:
        for options in (
            {},
            {"steps": 3},
            {"steps": 9, "temperature": 0.7, "top_p": 0.9},
            {"decode_block": 2, "steps": 6},
            {"min_tokens": 2, "schedule": "cos", "top_k": 2},
            {"steps": 5, "seeds": [3, 1, 4, 1]},
        ):
            yield sampler, toy.Lookup(blur=0.2), test_maths.CANVAS, options


def network_cases():
    """Caches, guidance, stop and window, on a prompt and a suffix, a prompt, and a text with holes.
    Each begins with a token that stays in sight: where all is masked, positions tie exactly."""
    model, canvas = test_maths.network().double(), test_maths.REAL.clone()
    canvas[2, 0] = 7
    document, window = {"rows": "document"}, {"window": 12, "decode_block": 5, "rows": "document"}
    for sampler in (
        "confidence",
        "threshold:0.5",
        "ancestral",
        "remdm_cap:0.2",
        "remask",
        "entropy_bounded:0.5",
        "first_hitting",
    ):
        for options in (
            {},
            {"cache": "prefix"},
            {"cache": "dual"},
            {"cache": "dual", "cache_refresh": 2},
            {"guidance": 0.7} | document,
            {"stop": 3},
            {"decode_block": 0},
            {"stop": 3, "steps": None},
            window,
            window | {"cache": "dual"},
            window | {"decode_block": 6, "guidance": 0.5},
        ):
            yield sampler, model, canvas, {"decode_block": 6, "steps": 16} | options


def left_to_right_cases():
    """Blocks and autoregressive, with and without exact keys and values, in the window and beyond
    it."""
    model, canvas = toy.network(6, 5, torch.float64), torch.full((2, 45), 5)
    canvas[:, :3], canvas[1, 20:23] = torch.tensor([1, 2, 3]), 4
    for family, rows, cache, window, sampler in itertools.product(
        ({"objective": "ar"}, {"block_len": 4}),
        ("stream", "document"),
        ("auto", "none"),
        (None, 16),
        ("confidence", "ancestral", "remask", "remdm_cap:0.3"),
    ):
        window = window and window + (rows == "document")
        more = {"rows": rows, "cache": cache, "window": window, "steps": 40}
        yield sampler, model, canvas, family | more
    prompts = torch.full((3, 12), 5)
    prompts[0, :5], prompts[1, 3], prompts[2, 2] = 1, 2, 3
    for sampler in policies.SAMPLERS:
        more = {"block_len": 4, "steps": 9, "seeds": [3, 4, 5], "stop": 2}
        yield sampler, model, prompts, more


def uniform_cases():
    M = toy.MASK
    canvas = torch.tensor([[0, M, M, M], [M, 1, M, 2], [0, 1, 2, 0]])
    for options in (
        {"steps": 5},
        {},
        {"steps": 3, "correctors": 2},
        {"schedule": "cos", "temperature": 0.5, "top_k": 2},
    ):
        yield "reverse", test_uniform.LeaveOneOut(0.1), canvas, {"objective": "uniform"} | options


def digests():
    """{what: hash of all steps of all its cases}"""
    found = {}
    for cases in (masked_cases, network_cases, left_to_right_cases, uniform_cases):
        for sampler, model, canvas, options in cases():
            digest = found.setdefault(f"{cases.__name__}, {sampler}", hashlib.sha256())
            for step in toy.sample(model, canvas, sampler=sampler, **options):
                parts = (step.ids, step.masked, step.fresh, step.remasked, step.row_nfe)
                digest.update(repr([part.tolist() for part in parts]).encode())
    return {name: digest.hexdigest()[:16] for name, digest in found.items()}


def test_every_sampler_generates_what_it_always_did():
    with open(PATH, encoding="utf-8") as file:
        recorded = json.load(file)
    found = digests()
    assert [name for name in recorded if found[name] != recorded[name]] == []
    assert found.keys() == recorded.keys(), "record the new ones: python tests/test_seeds.py"


if __name__ == "__main__":
    with cli.replacing(PATH) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(digests(), file, indent=0)
        file.write("\n")
