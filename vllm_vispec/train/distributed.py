"""One process or many: ranks, sums over all processes, sharding, and requests to stop.

A run has one process per GPU (or per CPU worker), started by `torchrun` or by Ray Train. Weights,
gradients and moments of the draft are sharded by FSDP2 (`fully_shard`), which works on GPUs (NCCL)
and on CPUs (gloo). Every process sees its own samples; only the main one writes results.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
        if self.world == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any process."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item() > 0)

    def same(self, value: float) -> float:
        """Return the main process's value on every process."""
        mine = torch.tensor([value if self.is_main else 0.0], dtype=torch.float64)
        return float(self.sum(mine.to(self.device)).item())


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the run's processes. A process group that exists already (Ray's) is used and kept.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        ViSpecError: a GPU was asked for and there is none.
    """
    chosen = pick_device(device)
    mine = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if mine:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        if dist.is_initialized():
            yield Processes(dist.get_rank(), dist.get_world_size(), chosen)
        else:
            yield Processes(0, 1, chosen)
    finally:
        if mine:
            dist.destroy_process_group()


def pick_device(device: str) -> torch.device:
    """Return the device of this process.

    Raises:
        ViSpecError: see `processes`.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ViSpecError("run.device is 'cuda' and PyTorch sees no GPU: use 'auto' or 'cpu'")
    if device == "cpu" or not available:
        return torch.device("cpu")
    # Ray may show a worker its own GPU only, as number 0.
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def shard(module: nn.Module, group: Processes) -> None:
    """Shard a module's parameters over all processes, in place.

    The module is gathered as a whole in its forward: rollouts call its parts one by one, so
    gathering part by part would not work. Gradients come out as means over the processes.
    """
    if group.world == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(group.device.type, (group.world,))
    fully_shard(module, mesh=mesh, reshard_after_forward=False)


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor, detached. All processes must call this together."""
    full = tensor.detach()
    return full.full_tensor() if hasattr(full, "full_tensor") else full


@torch.no_grad()
def assign(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy full tensors by name into parameters or moments, sharded or not."""
    for name, parameter in parameters.items():
        parameter.copy_(like(parameter, values[name]))


def like(pattern: Tensor, value: Tensor) -> Tensor:
    """Return a full tensor in the dtype, on the device and with the sharding of `pattern`."""
    moved = value.to(pattern.device, pattern.dtype)
    if not hasattr(pattern, "full_tensor"):
        return moved
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(moved, pattern.device_mesh, pattern.placements)


@dataclass
class StopRequest:
    """Whether the run was asked to end, and by which signal."""

    signal_name: str = ""

    def __bool__(self) -> bool:
        return bool(self.signal_name)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGINT into a request; a second one acts as usual.

    Outside the main thread (a Ray worker) signals are not ours to handle.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: FrameType | None) -> None:
        request.signal_name = signal.Signals(number).name
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
