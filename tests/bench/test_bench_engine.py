"""A small matrix on the shipped pair, with real servers and the real load generator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from examples.tiny_vlm.samples import DemoSample, demo_samples
from tests.bench.fakes import HEAD, TARGET
from tests.serve.server import ENVIRONMENT
from vllm_vispec.bench.quick import SERVE_ARGS, Floors, judge, quick_settings
from vllm_vispec.bench.runner import run_matrix
from vllm_vispec.bench.schema import BenchRun, BenchSample
from vllm_vispec.conversations.types import Part, Turn

pytestmark = [pytest.mark.engine, pytest.mark.serve, pytest.mark.slow]

NUM_TOKENS = 4
MAX_TOKENS = 32
FAMILIES = ("captioning", "charts", "multi_turn")


def to_sample(demo: DemoSample, name: str, folder: Path) -> BenchSample:
    """Return a sample of the tiny world, its images as files."""
    files = []
    for number, image in enumerate(demo.images):
        files.append(folder / f"{name}-{number}.png")
        image.save(files[-1])
    waiting = iter(files)
    turns = []
    for message in demo.messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        turns.append(
            Turn(
                message["role"],
                tuple(
                    Part(image=str(next(waiting)))
                    if part["type"] == "image"
                    else Part(part["text"])
                    for part in parts
                ),
            )
        )
    return BenchSample(name, demo.family, tuple(turns), MAX_TOKENS)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[BenchSample]:
    folder = tmp_path_factory.mktemp("images")
    found = [to_sample(one, f"s{i}", folder) for i, one in enumerate(demo_samples(1, FAMILIES))]
    *found, dialogue = found
    # One whose earlier answer the target has to give.
    turns = tuple(turn for turn in dialogue.turns if turn.role != "assistant")
    return [*found, dialogue, replace(dialogue, sample_id="own", turns=turns)]


def test_two_sides(
    samples: list[BenchSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    settings = quick_settings(str(TARGET), str(HEAD), "tiny", NUM_TOKENS, SERVE_ARGS)
    settings = replace(settings, concurrency=(1, 2))
    assert any(sample.follow_up for sample in samples)

    outcome = run_matrix(settings, samples, tmp_path)

    assert (outcome.measured, outcome.failed) == (4, 0)
    run = BenchRun.load(tmp_path)
    findings = judge(run, settings, Floors(tokens_per_round=2.5))
    assert all(finding.ok for finding in findings), "\n".join(map(str, findings))
    for cell in run.cells:
        assert [request.sample_id for request in cell.requests] == [s.sample_id for s in samples]
        assert all(0 < request.ttft_s <= request.e2e_s for request in cell.requests)
        assert all(1 < request.output_tokens <= MAX_TOKENS for request in cell.requests)
        assert cell.memory.kv_blocks
        assert cell.memory.peak_bytes
        if cell.key.side == "plain":
            assert cell.spec is None
            continue
        assert cell.spec is not None
        assert cell.spec.draft_tokens == NUM_TOKENS * cell.spec.rounds
        assert sum(cell.spec.accepted_by_position) == cell.spec.accepted_tokens > 0
        # A chunk is a round, or two that the server sent together.
        assert all(len(r.itl_s) < r.output_tokens - 1 for r in cell.requests if r.output_tokens > 9)
