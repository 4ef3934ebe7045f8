"""Where and how a run computes: device, number format, compilation, seeds."""
import contextlib
import copy
import hashlib
import json
import os
import signal

import torch

from config import UserError, reason


def generator(*key):
    """A CPU random generator that is a function of `key` (numbers and strings), so nothing has to be saved."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def choose_device(name):
    """torch.device for auto | cpu | cuda | mps; a device that is asked for and missing is a UserError."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in has.items() if available)
    if not has[name]:
        raise UserError(f"device={name}: this machine has none that torch can use; use --device auto or cpu")
    return torch.device(name)


def has_bfloat16(device):
    """Whether bfloat16 is faster than float32 there, not just emulated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_dtype(name, device):
    """torch.dtype of matrix products for auto | float32 | bfloat16 | float16."""
    if name == "auto":
        name = "bfloat16" if has_bfloat16(device) else "float16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def autocast(device, dtype):
    """Context in which matrix products run in `dtype`; weights, softmax and losses stay float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def peak_memory(device):
    """Most memory in use so far, in bytes: of the GPU, or of the process (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device):
    """Let `peak_memory` of a GPU count from now on; that of a process cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


COMPILE_PAYS = 300  # seconds of eager CPU training: compiling takes up to a minute, and a step is then 1.5 times faster


def maybe_compile(model, cfg, device, seconds, try_out):
    """`model` with compiled blocks, sharing its weights, or `model` itself where compiling does not pay.

    seconds is how long the run would take without; try_out(model) runs a training pass, in which the compilation
    happens. auto: on CUDA, and for a CPU run that earns the compilation back. Only the blocks are compiled: one
    compilation serves all of them, and the number of masked positions, which changes every step, stays outside.
    Without a working compiler: eager, and a line.
    """
    wanted = cfg.compile == "on" or cfg.compile == "auto" and (
        device.type == "cuda" or device.type == "cpu" and seconds > COMPILE_PAYS)
    if not wanted:
        return model
    compiled = copy.copy(model)
    compiled._modules = dict(model._modules)
    # on a CPU the compiler's own random numbers, for dropout, are slower than PyTorch's
    options = {"fallback_random": True} if device.type == "cpu" else None
    compiled.blocks = torch.nn.ModuleList(torch.compile(block, options=options) for block in model.blocks)
    try:
        try_out(compiled)
    except Exception as error:  # noqa: BLE001 - whatever the compiler lacks (Triton, g++, headers), eager works
        model.zero_grad()  # of the pass that failed
        print(f"torch.compile does not work here ({reason(error)}); going on without it")
        torch._dynamo.reset()
        return model
    return compiled


def on_interrupt(action):
    """Call `action` at the first Ctrl-C or SIGTERM instead of stopping at once; returns what to hand back to
    `restore_signals`. A second one stops at once."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(*_):
        restore_signals(previous)
        action()

    for number in previous:
        signal.signal(number, handle)
    return previous


def restore_signals(previous):
    for number, handler in previous.items():
        signal.signal(number, handler)


def open_log(path, step):
    """The JSONL log at `path`, open for appending, without entries after `step` (a resumed run writes them anew)."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not step:
            return open(path, "x", encoding="utf-8")
        kept = []
        for line in open(path, encoding="utf-8") if os.path.exists(path) else ():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:  # a line that a crash cut off
                pass
        file = open(path, "w", encoding="utf-8")
        file.writelines(kept)
        return file
    except FileExistsError:
        raise UserError(f"{path} exists: another run of this name has just begun; start again, or give a --name") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None


def write_json(path, data):
    """Write `data` as JSON; an unwritable path is a UserError."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None


def synchronise(device):
    """Wait for what the device still computes, before reading the clock."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
