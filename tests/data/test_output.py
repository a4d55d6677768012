"""The output file: resuming, and everything that must not happen to what is there."""

from __future__ import annotations

import fcntl
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.data.fakes import COUNT, FakeBackend, changed, record, run
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.utils.errors import ViSpecError


def test_half_a_line_is_dropped(settings: RegenerateSettings) -> None:
    run(settings, FakeBackend())
    whole = settings.output.read_bytes()
    settings.output.write_bytes(whole[:-9])
    summary = run(settings, FakeBackend())
    assert (summary.success, summary.skipped) == (1, COUNT - 1)
    assert settings.output.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": 0.0}, "temperature 1.0, now it is 0.0"),
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"prompt_style": "none"}, "prompt_style 'long', now it is 'none'"),
        ({"target": "other"}, "target 'some/target', now it is 'other'"),
    ],
)
def test_never_mixes_configurations(
    settings: RegenerateSettings, change: dict[str, Any], named: str
) -> None:
    run(settings, FakeBackend())
    before = settings.output.read_bytes()
    with pytest.raises(ViSpecError, match="choose another file") as caught:
        run(changed(settings, **change), FakeBackend())
    assert named in str(caught.value)
    assert settings.output.read_bytes() == before


def test_foreign_or_damaged_output(settings: RegenerateSettings) -> None:
    settings.output.parent.mkdir()
    settings.output.write_text('{"id": "mine"}\n')
    with pytest.raises(ViSpecError, match="does not say how it was made"):
        run(settings, FakeBackend())
    assert settings.output.read_text() == '{"id": "mine"}\n'
    settings.output.unlink()
    run(settings, FakeBackend())
    lines = settings.output.read_text().splitlines()
    settings.output.write_text("\n".join([lines[0], "damaged", *lines[2:]]) + "\n")
    with pytest.raises(ViSpecError, match="line 2 is damaged; remove the line"):
        run(settings, FakeBackend())
    settings.input.write_text(json.dumps(record("new")) + "\n")
    with pytest.raises(ViSpecError, match="input_sha256"):
        run(settings, FakeBackend())


def test_output_in_use(settings: RegenerateSettings) -> None:
    run(settings, FakeBackend())
    with settings.output.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ViSpecError, match="written by another job"):
            run(settings, FakeBackend())
    assert run(settings, FakeBackend()).skipped == COUNT


def test_unusable_files(settings: RegenerateSettings) -> None:
    before = settings.input.read_bytes()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"output": settings.input}, "is the input"),
        ({"output": settings.input / "below" / "out.jsonl"}, "cannot be written"),
        ({"input": Path("none.jsonl")}, r"--input .* cannot be read"),
    ]
    for change, named in cases:
        with pytest.raises(ViSpecError, match=named):
            run(changed(settings, **change), FakeBackend())
    assert settings.input.read_bytes() == before


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``size`` bytes: writes are cut off, then fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_keeps_what_was_finished(settings: RegenerateSettings) -> None:
    run(settings, FakeBackend())
    whole = settings.output.read_bytes()
    settings.output.unlink()
    lines = whole.splitlines(keepends=True)
    room = len(b"".join(lines[:3])) + 40
    with (
        small_disk(room),
        pytest.raises(ViSpecError, match="3 finished samples are kept; make room") as caught,
    ):
        run(settings, FakeBackend())
    assert "\n" not in str(caught.value)
    assert settings.output.read_bytes() == b"".join(lines[:3])
    summary = run(settings, FakeBackend())
    assert (summary.success, summary.skipped) == (3, 3)
    assert settings.output.read_bytes() == whole
