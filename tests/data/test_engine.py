"""Regeneration through a real engine: seeds, several turns, bad samples, resuming; and with Ray."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.fakes import record
from tests.data.jobs import records, to_settings
from tests.serve.server import ENVIRONMENT
from tests.support.child import REPOSITORY, run_in_subprocess
from tests.support.engine import IN_PROCESS_ENV
from tests.support.tiny_store import TinyStore
from vllm_vispec.data.encode import Encoded, Encoder
from vllm_vispec.data.image_bounds import bounds_in
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import Conversation

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

GOOD = 7


def _turns(*questions: str) -> list[dict[str, str]]:
    pairs = [({"from": "human", "value": q}, {"from": "gpt", "value": "Old."}) for q in questions]
    return [turn for pair in pairs for turn in pair]


def write_input(folder: Path, pictures: Path) -> Path:
    """Five questions about one image, one about two, one dialogue without, and four bad ones."""
    one = {"image": str(pictures / "a.png")}
    two = {"image": [str(pictures / "b.png"), str(pictures / "wide.png")]}
    look = "<image>\nWhat is it?"
    lines: list[dict[str, Any]] = [
        one | {"id": f"same{number}", "conversations": _turns(look)} for number in range(4)
    ]
    lines += [
        one | {"id": "turns", "family": "talk", "conversations": _turns(look, "Sure?", "Why?")},
        two | {"id": "two", "conversations": _turns("<image>\n<image>\nWhich one?")},
        {"id": "text", "conversations": _turns("Hello?", "And?")},
        {"id": "broken", "image": str(pictures / "broken.png"), "conversations": _turns(look)},
        {"id": "missing", "image": "none.png", "conversations": _turns(look)},
        one | {"id": "endless", "conversations": _turns(look + " really" * 300)},
    ]
    file = folder / "in.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + '\n{"id": \n')
    return file


@pytest.fixture(
    scope="module", params=["qwen2_5_vl", pytest.param("llava_next", marks=pytest.mark.slow)]
)
def runs(
    request: pytest.FixtureRequest,
    tiny: TinyStore,
    pictures: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Two jobs with one engine; the output of the second was cut in half before its last run."""
    folder = tmp_path_factory.mktemp("regenerate")
    target = str(tiny.target(request.param))
    source = str(write_input(folder, pictures))
    arguments: dict[str, Any] = {"model": target, "source": source, "folder": str(folder)}
    if request.param == "qwen2_5_vl":
        arguments |= {"min_pixels": 4 * 28 * 28, "max_pixels": 6 * 28 * 28}
    first, second = run_in_subprocess("tests.data.jobs:run_twice", arguments, IN_PROCESS_ENV)
    return {"first": first, "second": second, "folder": folder, "target": target}


def test_counts_and_resuming(runs: dict[str, Any]) -> None:
    first, second = runs["first"], runs["second"]
    assert (first["total"], first["success"], first["error"]) == (GOOD + 4, GOOD, 4)
    rejected = (runs["folder"] / "one.jsonl.rejected.jsonl").read_text().splitlines()
    reasons = {item["id"]: item["reason"] for item in map(json.loads, rejected)}
    assert set(reasons) == {"broken", "missing", "endless", "line11"}
    assert "cannot be read" in reasons["broken"]
    assert "context length is 400" in reasons["endless"]
    assert second["success"] + second["skipped"] == GOOD
    assert second["success"] > 0
    assert second["skipped"] > 0
    assert second["records"] == first["records"]


def test_every_turn_is_answered_anew_with_a_seed_of_its_own(runs: dict[str, Any]) -> None:
    records = runs["first"]["records"]
    answers = {tuple(records[f"same{number}"]["response_token_ids"][0]) for number in range(4)}
    assert len(answers) > 1
    found = records["turns"]
    assert found["family"] == "talk"
    assert [turn["role"] for turn in found["messages"]] == ["user", "assistant"] * 3
    assert len(found["response_token_ids"]) == len(found["finish_reason"]) == 3
    assert all(0 < len(ids) <= 24 for ids in found["response_token_ids"])
    texts = [turn["content"][-1]["text"] for turn in found["messages"]]
    assert "Old." not in texts
    assert all("mention everything" in text for text in texts[::2])


def test_the_encoder_returns_the_engines_tokens(runs: dict[str, Any]) -> None:
    """A tiny random target writes tokens as no tokenizer would, hence the recorded ids."""
    first = runs["first"]
    failed = [item for item in first["records"].values() if not item["round_trip"]]
    assert (first["round_trip_failed"], first["round_trip_unchecked"]) == (len(failed), 0)
    bounds = bounds_in(next(iter(first["records"].values())))
    assert bounds == ({} if "llava" in runs["target"] else bounds | {"max_pixels": 6 * 28 * 28})
    encoder = Encoder(load_processor(runs["target"], bounds), 400, runs["folder"])
    for item in read_conversations(runs["folder"] / "one.jsonl"):
        assert isinstance(item, Conversation)
        encoded = encoder(item)
        assert isinstance(encoded, Encoded), encoded
        last = item.extra["response_token_ids"][-1]
        # Images of the same sizes, so the prompts are the same.
        assert encoded.token_ids.tolist() == [*first["prompts"][item.sample_id], *last]
        assert encoded.answer[-len(last) :].all()
        assert len(encoded.runs) == len(item.images)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ray", "processes"])
def test_two_workers(tiny: TinyStore, pictures: Path, tmp_path: Path, backend: str) -> None:
    source = write_input(tmp_path, pictures)
    arguments = {
        "model": str(tiny.target("qwen2_5_vl")),
        "source": str(source),
        "output": str(tmp_path / "out.jsonl"),
    }
    env = IN_PROCESS_ENV | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    (found,) = run_in_subprocess("tests.data.jobs:run_two", {"backend": backend, **arguments}, env)
    assert (found["total"], found["success"], found["error"]) == (GOOD + 4, GOOD, 4)
    made = records(to_settings(**arguments).output)
    assert len(made) == GOOD


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_engine_that_does_not_start_ends_with_one_line(
    tiny: TinyStore, pictures: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", str(tiny.target("qwen2_5_vl"))
    source.write_text(json.dumps(record("s0", image=str(pictures / "a.png"))) + "\n")
    files = ["--input", str(source), "--output", str(tmp_path / "out"), "--target", target]
    # No machine has all of its memory free.
    more = ["--max-model-len", "256", "--engine", '{"gpu_memory_utilization": 1.0}']
    env = {name: value for name, value in ENVIRONMENT.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    done = subprocess.run(
        [sys.executable, "-m", "vllm_vispec", "regenerate", *files, *more],
        capture_output=True,
        text=True,
        env=os.environ | env | {"PYTHONPATH": str(REPOSITORY)},
        timeout=280,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"vispec: the engine does not start with target {target}: ")
    assert "memory utilization" in last
    option = r"""lower gpu_memory_.*--engine '\{"gpu_memory_utilization": 0\.\d\d\}'"""
    assert re.search(option, last)
    Path(last.rpartition("(whole log: ")[2].removesuffix(")")).unlink()
