"""The server backend against a small server in this process, through the real OpenAI client."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.fake_server import ANSWER, FakeServer
from tests.data.fakes import changed
from tests.support.tiny_store import TinyStore
from vllm_vispec.data.regenerate import server as backend
from vllm_vispec.data.regenerate.job import Summary, regenerate_all
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.template import ChatTemplate, load_processor
from vllm_vispec.utils.errors import ViSpecError


def record(name: str, image: str = "a.png", question: str = "What?") -> dict[str, Any]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    asked = {"role": "user", "content": content}
    again = {"role": "user", "content": "Sure?"}
    return {"id": name, "messages": [asked, {"role": "assistant", "content": "Old."}, again]}


@pytest.fixture(scope="module")
def target(tiny: TinyStore) -> Path:
    return tiny.target("qwen2_5_vl")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retrying takes seconds; the client's own tests cover it."""
    monkeypatch.setattr(backend, "RETRIES", 0)


@pytest.fixture
def settings(target: Path, tmp_path: Path, pictures: Path) -> RegenerateSettings:
    records = [record(f"s{number}") for number in range(4)]
    records += [record("broken", "broken.png"), record("long", question="too long")]
    records += [record("wide", "wide.png")]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(item) + "\n" for item in records))
    return RegenerateSettings(
        target=str(target),
        input=source,
        output=tmp_path / "out.jsonl",
        image_root=pictures,
        prompt_style="none",
        temperature=0.7,
        top_p=0.9,
        max_tokens=50,
        concurrency=2,
        server="http://nowhere",
    )


def run(settings: RegenerateSettings, fake: FakeServer) -> Summary:
    with pytest.MonkeyPatch.context() as patch:
        fake.install(patch)
        return regenerate_all(settings, "server")


@pytest.fixture(scope="module")
def template(target: Path) -> ChatTemplate:
    return ChatTemplate(load_processor(target))


def test_regenerates(settings: RegenerateSettings, template: ChatTemplate) -> None:
    fake = FakeServer(template)
    summary = run(settings, fake)
    assert (summary.total, summary.success, summary.error) == (7, 5, 2)
    assert (summary.round_trip_failed, summary.round_trip_unchecked) == (0, 0)
    rejected = Path(f"{settings.output}.rejected.jsonl").read_text()
    assert "image broken.png cannot be read" in rejected
    assert "the server refuses: Error code: 400" in rejected
    found = {item["id"]: item for item in map(json.loads, settings.output.open())}
    assert [turn["role"] for turn in found["s1"]["messages"]] == ["user", "assistant"] * 2
    assert found["s1"]["messages"][1]["content"] == [{"type": "text", "text": ANSWER}]
    assert len(found["s1"]["response_token_ids"]) == 2
    assert [(112, 56)] in fake.sizes
    assert [(56, 56)] in fake.sizes
    for request in fake.requests:
        assert request["model"] == "served"
        assert (request["temperature"], request["top_p"]) == (0.7, 0.9)
        assert request["max_tokens"] == 50
        assert (request["top_k"], request["repetition_penalty"]) == (0, 1.0)
        assert request["return_token_ids"] is True
    second = [item for item in fake.requests if len(item["messages"]) == 3]
    assert len(second) == 5
    assert all(item["messages"][1]["content"][0]["text"] == ANSWER for item in second)
    # Five dialogues of two turns, and the one that the server refuses at once.
    assert len({request["seed"] for request in fake.requests}) == 11


def test_a_server_with_other_image_sizes(
    settings: RegenerateSettings, template: ChatTemplate
) -> None:
    smaller = changed(settings, max_pixels=4 * 28 * 28)
    with pytest.raises(
        ViSpecError, match=r"as 8 tokens, not as \d: start it with --mm-processor-k"
    ):
        run(smaller, FakeServer(template))


def test_requests_run_at_the_same_time(settings: RegenerateSettings) -> None:
    text = settings.input.read_text().splitlines()[:4]
    settings.input.write_text("\n".join(text))
    fake = FakeServer(meeting=asyncio.Barrier(2))
    assert run(settings, fake).success == 4


def test_a_server_without_token_ids(settings: RegenerateSettings) -> None:
    summary = run(changed(settings, target=""), FakeServer())
    assert summary.round_trip_unchecked == summary.success == 5
    assert json.loads(settings.output.open().readline())["response_token_ids"] == [None, None]


def test_a_server_that_goes_away_loses_nothing(
    settings: RegenerateSettings, template: ChatTemplate
) -> None:
    one_by_one = changed(settings, concurrency=1)
    with pytest.raises(ViSpecError, match=r"does not answer .* run the same command again"):
        run(one_by_one, FakeServer(template, refuse_after=4))
    assert len(settings.output.read_text().splitlines()) == 2
    with pytest.raises(ViSpecError, match="does not answer"):
        regenerate_all(changed(settings, server="http://127.0.0.1:9"), "server")
    summary = run(one_by_one, FakeServer(template))
    assert (summary.success, summary.error, summary.skipped) == (3, 2, 2)


def test_several_models(settings: RegenerateSettings) -> None:
    with pytest.raises(ViSpecError, match="serves one, two; give one of these"):
        run(settings, FakeServer(models=("one", "two")))
    fake = FakeServer(models=("one", settings.target))
    assert run(settings, fake).success == 5
    assert {request["model"] for request in fake.requests} == {settings.target}
