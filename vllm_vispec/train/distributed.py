"""One process or many: ranks, sums over all processes, copies of the draft, requests to stop.

A run has one process per GPU (or per CPU worker), started by `torchrun` or by Ray Train, and each
sees its own samples. A head is held whole by each, with its moments 16 bytes per weight, and
gradients are averaged once an optimizer step (DistributedDataParallel). A draft of a billion
weights is sharded (FSDP2). Both work with NCCL on GPUs and gloo on CPUs. Only the main process
writes results.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vllm_vispec.utils.errors import ViSpecError

# Other processes wait while one writes a cache or a checkpoint.
TIMEOUT = timedelta(hours=6)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes results."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process has arrived here."""
        if self.world > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.world > 1:
            values = values.to(self.device, copy=True)
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any process."""
        return bool(self.sum(torch.tensor(float(flag))) > 0)

    def same(self, value: float) -> float:
        """Return the main process's value on every process."""
        return float(self.sum(torch.tensor(value if self.is_main else 0.0, dtype=torch.float64)))


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the run's processes. A process group that exists already (Ray's) is used and kept.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        ViSpecError: a GPU was asked for and there is none.
    """
    chosen = _pick_device(device)
    mine = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if mine:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        yield Processes(rank, world, chosen)
    finally:
        if mine:
            dist.destroy_process_group()


def _pick_device(device: str) -> torch.device:
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ViSpecError("run.device is 'cuda' and PyTorch sees no GPU: use 'auto' or 'cpu'")
    if device == "cpu" or not available:
        return torch.device("cpu")
    # Ray may show a worker its own GPU only, as number 0.
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def shared(module: nn.Module, group: Processes, shard: bool) -> nn.Module:
    """Return a module with the same forward, whose gradients are means over all processes.

    They are exchanged in the backward pass, except inside `accumulating`.

    Args:
        shard: spread parameters and gradients over the processes, in place. The module is gathered
            as a whole in its forward: rollouts call its parts one by one.
    """
    if group.world == 1:
        return module
    if shard:
        mesh = init_device_mesh(group.device.type, (group.world,))
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
        return module
    return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def accumulating(replica: nn.Module, more_passes: bool) -> AbstractContextManager[Any]:
    """A forward and backward pass that keeps gradients to this process if more are to follow."""
    if isinstance(replica, FSDPModule):  # these gradients are whole meanwhile
        replica.set_requires_gradient_sync(not more_passes)
    is_shared = isinstance(replica, DistributedDataParallel)
    return replica.no_sync() if is_shared and more_passes else nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor, detached. All processes must call this together."""
    full = tensor.detach()
    return full.full_tensor() if isinstance(full, DTensor) else full


@torch.no_grad()
def assign(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy full tensors by name into parameters or moments, sharded or not."""
    for name, tensor in tensors.items():
        value = values[name].to(tensor.device, tensor.dtype)
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
        tensor.copy_(value)


@contextmanager
def stop_on_signals() -> Iterator[list[str]]:
    """Collect the name of the first SIGTERM or SIGINT; a second one acts as usual.

    Outside the main thread (a Ray worker) signals are not ours to handle.
    """
    request: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: FrameType | None) -> None:
        request.append(signal.Signals(number).name)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
