"""Samples made ready beside the training process: other processes read, decode and process ahead.

What comes when depends on the requests alone, so a run computes the same with any number of
processes, and after it was stopped and resumed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from vllm_vispec.utils.errors import ViSpecError

T = TypeVar("T")
Request = Sequence[int]
# Made ready before they are asked for: requests per process, and samples in all, whose pixels may
# take 12 MB each.
_AHEAD, _SAMPLES_AHEAD = 4, 64


class Loader(Generic[T]):
    """Makes samples ready, a few requests ahead.

    Args:
        make: makes one sample ready; runs in the other processes. A sample holds tensors on the
            CPU or arrays, in mappings or attributes.
        workers: other processes; 0: this one does it, when asked.
        pin: put tensors where a GPU reads them directly.
        room: bytes of samples that stay in memory, the first ones. Others are made again.
        together: samples of a request.
    """

    def __init__(
        self,
        make: Callable[[int], T],
        workers: int,
        pin: bool = False,
        room: int = 0,
        together: int = 1,
    ) -> None:
        self._make, self._workers, self._pin, self._room = make, workers, pin, room
        self._ahead = max(min(_AHEAD, _SAMPLES_AHEAD // (max(workers, 1) * together)), 1)
        self._kept: dict[int, T] = {}

    def __call__(self, requests: Iterable[Request]) -> Iterator[list[T]]:
        """Yield the samples of each request, in order. Requests are drawn ahead of that.

        Raises:
            ViSpecError: one of the processes was killed.
        """
        asked: deque[Request] = deque()

        def missing() -> Iterator[list[int]]:
            for request in requests:
                asked.append(request)
                yield [index for index in dict.fromkeys(request) if index not in self._kept]

        # A generator of its own, or it would draw from the run's. Forked, the processes share the
        # corpus instead of having copies.
        ahead = {"prefetch_factor": self._ahead, "multiprocessing_context": "fork"}
        loaded = iter(
            DataLoader(
                _Made(self._make),
                sampler=missing(),
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=self._workers,
                pin_memory=self._pin,
                generator=torch.Generator(),
                **(ahead if self._workers else {}),
            )
        )
        while True:
            try:
                found = dict(next(loaded))
            except StopIteration:
                return
            except ViSpecError as error:
                # Out of another process it comes with a traceback, its own line at the end.
                raise ViSpecError(str(error).rpartition("ViSpecError: ")[2].strip()) from error
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise ViSpecError(
                    f"a process that makes samples ready was killed ({error}): give the machine "
                    "or container more memory (docker: --shm-size) or lower data.workers, then "
                    "run the same command again"
                ) from error
            for index, sample in found.items():
                self._keep(index, sample)
            yield [
                found[index] if index in found else self._kept[index] for index in asked.popleft()
            ]

    def _keep(self, index: int, sample: T) -> None:
        size = _nbytes(sample)
        if index not in self._kept and size <= self._room:
            self._room -= size
            # Shared memory is scarce, and each piece holds a file open.
            self._kept[index] = sample if self._pin or not self._workers else deepcopy(sample)


class _Made(Dataset[Any]):
    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __getitem__(self, request: Request) -> list[tuple[int, Any]]:
        return [(index, self._make(index)) for index in request]


def _as_it_is(found: Any) -> Any:
    return found


def _nbytes(value: Any) -> int:
    size = getattr(value, "nbytes", None)
    if size is not None:
        return int(size)
    parts = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    return sum(map(_nbytes, parts.values()))
