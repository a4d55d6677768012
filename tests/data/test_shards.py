"""Answers to a large input: several files, a manifest, and readers to whom they are one file."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.data.fakes import COUNT, FakeBackend, Killed, changed, record, run
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.shards import exists
from vllm_vispec.evaluate.options import EvalOptions
from vllm_vispec.train.config import DataConfig
from vllm_vispec.train.data import read_corpus
from vllm_vispec.utils.errors import ViSpecError


@pytest.fixture
def sharded(settings: RegenerateSettings) -> RegenerateSettings:
    """Nine samples, six of them usable, in files of two."""
    return changed(settings, shard_samples=2, output=settings.output.with_name("answers.jsonl"))


def shard(settings: RegenerateSettings, number: int) -> Path:
    return settings.output.with_name(f"answers-{number:05}.jsonl")


def manifest(settings: RegenerateSettings) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(settings.beside("meta.json").read_text())
    return found


def test_several_files_are_read_as_one(
    settings: RegenerateSettings, sharded: RegenerateSettings
) -> None:
    run(settings, FakeBackend())
    whole = list(read_conversations(settings.output))
    assert exists(settings.output)
    assert not exists(sharded.output)
    run(sharded, FakeBackend())
    assert not sharded.output.exists()
    assert exists(sharded.output)
    content = [shard(sharded, number).read_bytes() for number in range(3)]
    assert b"".join(content) == settings.output.read_bytes()
    assert manifest(sharded) == json.loads(settings.beside("meta.json").read_text()) | {
        "shards": [
            {
                "file": f"answers-0000{number}.jsonl",
                "samples": 2,
                "bytes": len(one),
                "sha256": sha256(one).hexdigest(),
            }
            for number, one in enumerate(content)
        ]
    }
    assert list(read_conversations(sharded.output)) == whole
    # What trains and what measures.
    corpora = [read_corpus(DataConfig(train=(str(one.output),))) for one in (settings, sharded)]
    assert corpora[0].entries == corpora[1].entries
    assert corpora[0].digest != corpora[1].digest
    assert EvalOptions(target="t", head="h", data=sharded.output).image_folder.samefile(
        sharded.output.parent
    )
    # Answers may be asked again.
    again = changed(sharded, input=sharded.output, output=sharded.output.with_name("again.jsonl"))
    assert run(again, FakeBackend()).success == COUNT


def test_a_killed_job_goes_on(settings: RegenerateSettings, sharded: RegenerateSettings) -> None:
    run(settings, FakeBackend())
    with pytest.raises(Killed):
        run(sharded, FakeBackend(dies_at=3))
    with shard(sharded, 1).open("a") as file:
        file.write('{"id": "s')
    full, current = manifest(sharded)["shards"]
    assert full["samples"] == 2
    assert current == {"file": "answers-00001.jsonl"}
    assert [one.sample_id for one in read_conversations(sharded.output)] == [
        *("s5", "s4", "s3"),
        "line4",
    ]
    backend = FakeBackend()
    assert run(sharded, backend).skipped == 3
    assert backend.asked == ["s2", "s1", "s0"]
    content = [shard(sharded, number).read_bytes() for number in range(3)]
    assert b"".join(content) == settings.output.read_bytes()
    assert [one["samples"] for one in manifest(sharded)["shards"]] == [2, 2, 2]
    # What was rejected and is answered now begins another; files may be larger from now on.
    (settings.input.parent / "none.png").write_bytes(b"there now")
    assert run(sharded, FakeBackend()).success == 1
    assert [one["samples"] for one in manifest(sharded)["shards"]] == [2, 2, 2, 1]
    shard(sharded, 3).unlink()
    assert run(changed(sharded, shard_samples=9), FakeBackend()).success == 1
    assert [one["samples"] for one in manifest(sharded)["shards"]] == [3, 2, 2, 0]


def test_a_damaged_or_missing_one(sharded: RegenerateSettings) -> None:
    def refused(problem: str) -> None:
        with pytest.raises(ViSpecError, match=f"answers-00001.jsonl, a shard of .* {problem}"):
            list(read_conversations(sharded.output))

    run(sharded, FakeBackend())
    before = manifest(sharded)
    content = shard(sharded, 1).read_bytes()
    shard(sharded, 1).write_bytes(content.replace(b"says", b"sais"))
    refused("is not what was written: put it back as it was, or delete it")
    with pytest.raises(ViSpecError, match="is not what was written"):
        run(sharded, FakeBackend())
    shard(sharded, 1).unlink()
    refused(r"cannot be read \(No such file")
    backend = FakeBackend()
    assert run(sharded, backend).success == 2
    assert backend.asked == ["s3", "s2"]
    assert manifest(sharded) == before
    sharded.beside("meta.json").write_text('{"shards": 3}')
    with pytest.raises(ViSpecError, match=r"answers.jsonl.meta.json is damaged \(.*array"):
        list(read_conversations(sharded.output))


def test_a_file_of_that_name_is_left_alone(sharded: RegenerateSettings) -> None:
    sharded.output.parent.mkdir()
    shard(sharded, 0).write_text(json.dumps(record("mine")))
    with pytest.raises(ViSpecError, match=r"would be a shard of .* move it away"):
        run(sharded, FakeBackend())
    assert json.loads(shard(sharded, 0).read_text()) == record("mine")
