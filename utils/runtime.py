"""Where and how a run computes: device, number format, compilation, processes, seeds."""

import contextlib
import copy
import ctypes
import functools
import hashlib
import json
import logging
import math
import os
import re
import signal
import sys
import time

import torch

from utils import cli
from utils.cli import UserError, reason


def quiet_hub():
    """Let huggingface_hub tell errors alone: each of its retries is a warning of two lines."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def generator(*key):
    """A CPU random generator that is a function of `key` (numbers and strings), so nothing has to
    be saved."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def choose_device(name):
    """torch.device for auto | cpu | cuda | mps; a device that is asked for and missing is a
    UserError."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in has.items() if available)
    if not has[name]:
        raise UserError(
            f"device={name}: this machine has none that torch can use; use --device auto or cpu"
        )
    return torch.device(name)


def has_bfloat16(device):
    """Whether bfloat16 is faster than float32 there: not emulated, and not slower, as AVX-512's is
    on Intel's CPUs whose AMX is hidden from a virtual machine (half as fast). The environment's
    ATEN_CPU_CAPABILITY=avx2, which keeps PyTorch from a CPU's newer instructions, makes it a
    machine without."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if torch.cpu._is_amx_tile_supported():
        return True
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    # where they are about as fast, float32 loses nothing
    return 1.2 * seconds_of_product(torch.bfloat16) < seconds_of_product(torch.float32)


@functools.cache
def seconds_of_product(dtype, size=512, rounds=10):
    """Least time of a matrix product on one core of the CPU: threads that wait for each other are
    slowed by any other program, and then the ratio of two types says nothing."""
    a, times, threads = torch.ones(size, size, dtype=dtype), [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(rounds):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times)


def choose_dtype(name, device):
    """torch.dtype of matrix products for auto | float32 | bfloat16 | float16, where a network is
    trained."""
    if name == "auto":
        name = (
            "bfloat16"
            if has_bfloat16(device)
            else "float16"
            if device.type == "cuda"
            else "float32"
        )
    return getattr(torch, name)


def dtype_of_run(name, trained, device, path):
    """torch.dtype in which the network of the checkpoint `path` is judged and sampled: `name`, or
    for "auto" that of its training, `trained`, so that its figures and texts can be had again on
    any machine. A line on stderr says where it is slow."""
    name = trained if name == "auto" else name
    # a run that did not say is judged as any machine can
    dtype = torch.float32 if name == "auto" else getattr(torch, name)
    if (
        not has_bfloat16(device)
        if dtype == torch.bfloat16
        else dtype == torch.float16 and device.type == "cpu"
    ):
        whose = f", in which {path} was trained" if name == trained else ", as asked"
        print(
            f"{name}{whose}, is slow on the {device.type} of this machine; with --dtype float32 it "
            "is faster, and its figures differ slightly",
            file=sys.stderr,
        )
    return dtype


# numbers, of some 40 bytes in all, that a pass of the sampler may hold
AT_ONCE = {"cpu": 2**26, "cuda": 2**27, "mps": 2**26}


def rows_that_fit(family, vocabulary, length, device):
    """How many rows of `length` tokens may be generated together, so that memory does not grow with
    their number: by their logits, which a model of blocks or from left to right has of its block
    alone, and by what a pass keeps of each layer."""
    cfg, seen = family.cfg, min(length, family.cfg.seq_len)
    asked = min(seen, family.block_len or seen)
    return max(
        1, AT_ONCE[device.type] // max(asked * vocabulary, seen * cfg.n_layer * cfg.n_embd // 4)
    )


def dtype_name(dtype):
    """torch.bfloat16 -> "bfloat16", as settings and tables have it."""
    return str(dtype).removeprefix("torch.")


def move(tensor, device):
    """`tensor` on `device`. A GPU need not wait for it if it is pinned (elsewhere a copy that
    nobody waits for may read memory that has been given away)."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def autocast(device, dtype):
    """Context in which matrix products run in `dtype`; weights, softmax and losses stay float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def keep_memory():
    """Let freed memory stay with the process (glibc only), for training on a CPU.

    By default every tensor above 32 MB is fetched from the system page by page and given back when
    freed, which took a third to a half of a training step's time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no glibc
        return
    mallopt(-4, 0)  # M_MMAP_MAX: nothing by mmap
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def peak_memory(device):
    """Most memory in use so far, in bytes: of the GPU, or of the process (0 where the system does
    not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as file:
        # ru_maxrss is at least that of the process which started this one
        if found := re.search(r"^VmHWM:\s+(\d+) kB", file.read(), re.M):
            return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_memory():
    """Bytes of this machine's memory, without swap, or of its container's (inf where the system
    does not tell)."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return math.inf
    if total <= 0:
        return math.inf
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" where there is none
        with open("/sys/fs/cgroup/memory.max", encoding="utf-8") as file:
            total = min(total, int(file.read()))
    return total


def check_memory(needed, what):
    """Complain before memory is taken of which `what` (str) needs at least so many bytes: a system
    that has less ends a process without a word."""
    if needed > (total := total_memory()):
        raise UserError(
            f"{what} needs at least {needed / 2**30:,.1f} GB, and this machine has "
            f"{total / 2**30:,.1f} GB"
        )


def reset_peak_memory(device):
    """Let `peak_memory` of a GPU count from now on; that of a process cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def keep_compiled_apart():
    """Give the code that is compiled for this kind of CPU a cache of its own, unless the user has
    chosen one. The compiler does not ask code that it finds there for which instructions it was
    made: what a CPU with AVX-512 had left ended in a segmentation fault under
    ATEN_CPU_CAPABILITY=avx2."""
    with contextlib.suppress(ImportError):  # without a compiler there is no cache
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        name, usual = "TORCHINDUCTOR_CACHE_DIR", default_cache_dir()
        # where it is not set, torch does so itself when it is imported
        if os.environ.get(name, usual) == usual:
            os.environ[name] = f"{usual}_{torch.backends.cpu.get_cpu_capability()}"


def compile_network(model, token_nll, device, try_out):
    """(`model` compiled, sharing its weights; token_nll compiled; what try_out(model, token_nll)
    returned, which runs training passes, in which the compilation happens). Without a working
    compiler None, and a line that says so.

    It is compiled in parts: one compilation serves all blocks but the last.
    """
    keep_compiled_apart()
    compiled = copy.copy(model)
    compiled._modules = dict(model._modules)
    # on a CPU the compiler's own random numbers, for dropout, are slower than PyTorch's
    options = {"fallback_random": True} if device.type == "cpu" else None
    compiled.blocks = torch.nn.ModuleList(
        torch.compile(block, options=options) for block in model.blocks
    )
    compiled.embed, compiled.unembed, compiled_nll = (
        torch.compile(function, options=options)
        for function in (model.embed, model.unembed, token_nll)
    )
    try:
        result = try_out(compiled, compiled_nll)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler lacks (Triton, g++, headers), eager works
        model.zero_grad()  # of the pass that failed
        if is_first():
            print(f"torch.compile does not work here ({reason(error)}); going on without it")
        torch._dynamo.reset()
        return None
    return compiled, compiled_nll, result


def is_first():
    """Whether this process is the only one or the first: the one that speaks and writes."""
    return os.environ.get("RANK", "0") == "0"


# --- files and signals ----------------------------------------------------------------------------


def on_interrupt(action):
    """Call `action` at the first Ctrl-C or SIGTERM instead of stopping at once; returns what to
    hand back to `restore_signals`. A second one stops at once."""
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


def begin_log(path, step):
    """Make the JSONL log at `path`, or take its entries after `step` away (a resumed run writes
    them anew)."""
    try:
        if not step:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            return open(path, "x").close()
        lines = open(path, encoding="utf-8") if os.path.exists(path) else ()
        kept = [line.rstrip("\n") + "\n" for line in lines if _step_of(line) <= step]
        with cli.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(kept)
    except FileExistsError:
        raise UserError(
            f"{path} exists: another run of this name has just begun; start again, or give a --name"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None


def _step_of(line):
    """The step of a line of the log; inf of one that a crash cut off, or of somebody else."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return 0 + json.loads(line)["step"]  # a number, or a TypeError
    return math.inf


def write_line(path, entry):
    """Append the dict `entry` to the JSONL file; a full disk is a UserError."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; the last checkpoint is untouched") from None


def write_json(path, data):
    """Write `data` as JSON, whole or not at all; an unwritable path is a UserError."""
    with cli.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)


def synchronise(device):
    """Wait for what the device still computes, before reading the clock."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
