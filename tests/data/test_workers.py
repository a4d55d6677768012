"""Several engines: handing out dialogues and taking results, without a cluster or a GPU."""

from __future__ import annotations

import pickle
import queue
import sys
from pathlib import Path

import pytest

from vllm_vispec.data.read import to_conversation
from vllm_vispec.data.regenerate import ray_data
from vllm_vispec.data.regenerate.processes import ProcessesBackend, drain, share_gpus
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.types import Rejected
from vllm_vispec.utils.errors import ViSpecError

SETTINGS = RegenerateSettings(
    target="target", input=Path("in.jsonl"), output=Path("out.jsonl"), workers=2
)


class Numbers(queue.Queue[int]):
    """A queue as Ray's."""

    def put_nowait_batch(self, numbers: list[int]) -> None:
        for number in numbers:
            self.put(number)


def test_a_worker_takes_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine is handed the next dialogue when it asks; what a dead worker took is done again."""
    todo = [
        to_conversation({"messages": [{"role": "user", "content": "Why?"}]}, i) for i in "abcde"
    ]
    numbers, results = Numbers(), queue.Queue[Rejected]()
    backend, attempts, seen = object.__new__(ray_data.RayBackend), [], set[str]()

    def answer(*_: object) -> None:
        attempts.append(numbers.qsize())
        pulled = ray_data.taken(numbers)
        if len(attempts) == 1:
            next(pulled)  # taken by a worker that dies
        for number in pulled:
            results.put(Rejected(todo[number].sample_id, "bad"))

    monkeypatch.setattr(backend, "_answer", answer)
    drained = drain(results, lambda: backend._run(todo, numbers, results, seen), seen, 0.05)
    found = [one.sample_id for one in drained if isinstance(one, Rejected)]
    assert (sorted(found), attempts) == (list("abcde"), [5, 1])


def test_every_result_once_and_then_the_failure() -> None:
    results: queue.Queue[Rejected] = queue.Queue()

    def work() -> None:
        for name in ("a", "b", "a"):
            results.put(Rejected(name, "bad"))
        raise RuntimeError("Traceback\n  lines\nViSpecError: no such target\n")

    taken = drain(results, work, set(), poll_s=0.05)
    assert [next(taken), next(taken)] == [Rejected("a", "bad"), Rejected("b", "bad")]
    with pytest.raises(ViSpecError, match="the workers failed: no such target"):
        next(taken)


def test_each_process_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS.model_copy(update={"engine": {"tensor_parallel_size": 2}})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert share_gpus(settings) == ["", ""]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert share_gpus(settings) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    assert share_gpus(settings) == ["7,5", "3,1"]
    more = settings.model_copy(update={"workers": 3})
    with pytest.raises(ViSpecError, match=r"--workers 3 with 2 GPUs each, there are 4: .* to 2 or"):
        share_gpus(more)


def test_a_process_that_ends_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    """Its own line, then one of the job; no traceback."""
    todo = [to_conversation({"messages": [{"role": "user", "content": "Why?"}]}, i) for i in "ab"]
    backend = ProcessesBackend(SETTINGS)
    with pytest.raises(ViSpecError, match="workers failed: 2 of 2 ended with exit code 1"):
        list(backend.answer(todo))
    said = capfd.readouterr().err
    assert "vispec: target target is neither a folder nor a hub id" in said
    assert "Traceback" not in said


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ViSpecError, match=r"--ray needs Ray Data .*; run: pip install"):
        ray_data.RayBackend(SETTINGS)


def test_what_travels_to_the_workers(tmp_path: Path) -> None:
    moved = SETTINGS.model_copy(update={"target": f"{tmp_path}/"}).with_absolute_paths()
    assert moved.input.is_absolute()
    assert moved.output.is_absolute()
    assert moved.target == str(tmp_path)
    assert SETTINGS.with_absolute_paths().target == "target"
    record = {"messages": [{"role": "user", "content": "Why?"}], "more": 1}
    for one in (moved, to_conversation(record, "a")):
        assert pickle.loads(pickle.dumps(one)) == one  # noqa: S301
