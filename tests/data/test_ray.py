"""Handing out blocks and taking results, without a cluster."""

from __future__ import annotations

import queue
import sys
from pathlib import Path

import pytest

from vllm_vispec.data.regenerate.backends import ray_data
from vllm_vispec.data.regenerate.backends.wire import result_to_json
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.types import Rejected
from vllm_vispec.utils.errors import ViSpecError

SETTINGS = RegenerateSettings("target", Path("in.jsonl"), Path("out.jsonl"), workers=2)


def items(count: int) -> list[dict[str, str]]:
    return [{"item": str(number)} for number in range(count)]


@pytest.mark.parametrize(
    ("count", "workers", "sizes"),
    [(1, 4, [1]), (7, 2, [4, 3]), (8, 2, [4, 4]), (130, 1, [64, 64, 2]), (300, 2, [64] * 4 + [44])],
)
def test_blocks(count: int, workers: int, sizes: list[int]) -> None:
    blocks = ray_data.to_blocks(items(count), workers)
    assert [len(block) for block in blocks] == sizes
    assert [item for block in blocks for item in block] == items(count)


def test_a_block_that_ran_twice_counts_once() -> None:
    results: queue.Queue[str] = queue.Queue()

    def hand_out(cluster: ray_data.Cluster, blocks: ray_data.Blocks) -> set[int]:
        for name in ("a", "b", "a"):
            cluster.queue.put(result_to_json(Rejected(name, "bad")))
        return {1}

    job = ray_data.BlockJob(hand_out, ray_data.Cluster(SETTINGS, results, 2, 0), [])
    found = list(ray_data.drain(results, job, poll=0.05))
    assert found == [Rejected("a", "bad"), Rejected("b", "bad")]
    assert job.processes == {1}


def test_failed_workers_after_some_results() -> None:
    results: queue.Queue[str] = queue.Queue()

    def hand_out(cluster: ray_data.Cluster, blocks: ray_data.Blocks) -> set[int]:
        cluster.queue.put(result_to_json(Rejected("a", "bad")))
        raise RuntimeError("Traceback\n  lines\nViSpecError: no such target\n")

    job = ray_data.BlockJob(hand_out, ray_data.Cluster(SETTINGS, results, 2, 0), [])
    taken = ray_data.drain(results, job, poll=0.05)
    assert next(taken) == Rejected("a", "bad")
    with pytest.raises(ViSpecError, match="the Ray job failed: no such target"):
        next(taken)


def test_the_way_depends_on_ray_datas_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", sys)
    monkeypatch.setitem(sys.modules, "pyarrow", sys)
    assert ray_data.choose_way() == "data"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert ray_data.choose_way() == "actors"
    assert set(ray_data.HAND_OUT) == {"data", "actors"}


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ViSpecError, match=r"--ray needs Ray; run: pip install"):
        ray_data.RayBackend(SETTINGS)


def test_settings_travel_with_absolute_paths(tmp_path: Path) -> None:
    moved = RegenerateSettings(str(tmp_path) + "/", Path("in.jsonl"), Path("out.jsonl")).anywhere()
    assert moved.input.is_absolute()
    assert moved.output.is_absolute()
    assert moved.target == str(tmp_path)
    assert SETTINGS.anywhere().target == "target"
