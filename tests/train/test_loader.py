"""Samples are made ready in other processes, ahead of their use, and nothing else changes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.tiny_store import TinyStore
from tests.train.runs import lines, losses, recipe, run
from vllm_vispec.train.loader import Loader
from vllm_vispec.utils.errors import ViSpecError

REQUESTS = [[1, 2], [3, 1], [2, 2], [4], [1, 4], [5], [6], [7], [8]]


def made(index: int) -> dict[str, torch.Tensor]:
    return {"sample": torch.full((4,), index), "process": torch.tensor(os.getpid())}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("room", [0, 80, 10_000])
def test_requests_in_order(workers: int, room: int) -> None:
    drawn = []

    def requests() -> Iterator[list[int]]:
        for request in REQUESTS:
            drawn.append(request)
            yield request

    before = torch.get_rng_state()
    loader = Loader(made, workers, room=room)
    found = loader(requests())
    first = next(found)
    assert len(drawn) == (9 if workers else 1)  # all are made ready ahead
    assert (int(first[0]["process"]) != os.getpid()) == (workers > 0)
    every = [first, *found]
    assert [[int(one["sample"][0]) for one in samples] for samples in every] == REQUESTS
    assert torch.equal(torch.get_rng_state(), before)
    # What is kept is not made again: it is the same object.
    twice = list(loader([[1], [1]]))
    assert (twice[0][0] is twice[1][0]) == (room > 0)


def test_few_samples_are_ahead_where_requests_are_large() -> None:
    drawn = []

    def requests() -> Iterator[list[int]]:
        for request in REQUESTS:
            drawn.append(request)
            yield request

    next(Loader(made, 2, together=32)(requests()))
    assert len(drawn) == 2 * 1 + 1


def test_a_killed_process() -> None:
    def die(index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index

    with pytest.raises(ViSpecError, match=r"makes samples ready was killed .*lower data\.workers"):
        list(Loader(die, 1)([[1]]))


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_run_is_the_same_with_workers(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, mode: str
) -> None:
    target = tiny.target("qwen2_5_vl")
    for name, workers in (("none", 0), ("two", 2)):
        run(recipe(target, dialogues, tmp_path / name, data__workers=workers, teacher__mode=mode,
                   data__memory_mb=0, run__validate_every=3, loss__noise=0.2,
                   teacher__cache_dir=str(tmp_path / f"cache-{name}")))  # fmt: skip
    assert losses(tmp_path / "none") == losses(tmp_path / "two")
    rates = [
        [line["acceptance_length"] for line in lines(tmp_path / name, "validation")]
        for name in ("none", "two")
    ]
    assert rates[0] == rates[1]
