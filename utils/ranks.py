"""Where a run computes: this process's hardware, and the other processes, one a GPU, that torchrun
started."""

import contextlib
import os
from typing import NamedTuple

import torch
import torch.distributed as dist

from utils import runtime
from utils.cli import UserError


class Hardware(NamedTuple):
    """Where a run computes: the device and the number format of this process, and its place among
    those that torchrun started."""

    device: torch.device
    dtype: torch.dtype = torch.float32  # of matrix products
    rank: int = 0  # of this process
    world: int = 1  # how many there are

    def autocast(self):
        """Context in which matrix products run in its dtype."""
        return runtime.autocast(self.device, self.dtype)

    def move(self, tensor):
        """`tensor` on its device."""
        return runtime.move(tensor, self.device)

    def agree(self, value):
        """The first process's `value` (whatever pickle takes), in all of them."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def sum(self, x):
        """Sum of the tensor x of all processes, in all of them."""
        if self.world == 1:
            return x
        x = x.clone()
        dist.all_reduce(x)
        return x


def start(device, dtype):
    """The Hardware of a run; joins the other processes where torchrun started this one. device and
    dtype as in `choose_device` and `choose_dtype`.

    Small things are agreed on over gloo, on the CPU, so that no process waits for its GPU;
    gradients go over nccl.
    """
    device, name = runtime.choose_device(device), dtype
    if "LOCAL_RANK" not in os.environ:
        return Hardware(device, runtime.choose_dtype(name, device))
    if device.type == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']} with "
                f"{torch.cuda.device_count()} GPUs: start one process for each"
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        torch.set_num_threads(max(1, cpu_cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
    else:
        raise UserError(f"torchrun works with device=cuda and cpu, not {device.type}")
    if not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://"))
        # torchrun keeps the store; without a prefix the processes would look for those that died
        if restarted():
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world,
        )
    return Hardware(
        device, runtime.choose_dtype(name, device), dist.get_rank(), dist.get_world_size()
    )


def cpu_cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def end(hardware):
    """Leave the other processes, when all have done their work."""
    if hardware.world > 1:
        dist.destroy_process_group()


def torchrun_job():
    """Name (str) of the torchrun job that this process belongs to, the same after each of its
    restarts; "" without. Its process is part of it: the name alone may have been given to an
    earlier job."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return name and f"{name} of process {os.getppid()}"


def restarted():
    """Whether torchrun has started all processes anew, after a crash. On one node: several nodes
    count for themselves, and are not known to agree."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    if os.environ["WORLD_SIZE"] != os.environ["LOCAL_WORLD_SIZE"]:
        raise UserError(
            "a process crashed; over several nodes start them all again, with --resume auto"
        )
    return True


@contextlib.contextmanager
def first_rank_first(hardware):
    """The first process goes through, then the first of each machine, then the others: they make
    the files that these find, and machines may share a disk."""
    turn = 0 if not hardware.rank else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for _ in range(turn):
        dist.barrier()
    failed = None
    try:
        yield
    # a corpus is missing, say, which the others will find out themselves
    except UserError as error:
        failed = error
    for _ in range(2 - turn if hardware.world > 1 else 0):
        dist.barrier()
    if failed:
        raise failed


def distribute(model, hardware):
    """`model` such that backward passes average the gradients of all processes (DDP)."""
    if hardware.world == 1:
        return model
    device = hardware.device
    network = torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
    network.vocab_size, network.mean_embedding = model.vocab_size, model.mean_embedding
    return network


def gradient_sync(network, wanted):
    """Context of a backward pass, after which the processes' gradients are averaged or (more rows
    follow) not yet."""
    return (
        contextlib.nullcontext() if wanted or not hasattr(network, "no_sync") else network.no_sync()
    )
