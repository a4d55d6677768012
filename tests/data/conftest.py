"""Fixtures of the regeneration tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.fakes import COUNT, record
from tests.support.tiny_models import random_image
from vllm_vispec.data.regenerate.settings import RegenerateSettings


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.png, b.png, wide.png, and the unusable broken.png and cut.png."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, (name, size) in enumerate({"a": (56, 56), "b": (84, 84), "wide": (112, 56)}.items()):
        random_image(seed, size).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "cut.png").write_bytes((folder / "b.png").read_bytes()[:60])
    return folder


@pytest.fixture(autouse=True)
def _no_such_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for an engine answer for targets that do not exist."""
    whole = RegenerateSettings.with_image_bounds
    monkeypatch.setattr(
        RegenerateSettings,
        "with_image_bounds",
        lambda self: self if self.target in ("some/target", "other") else whole(self),
    )


@pytest.fixture
def settings(tmp_path: Path) -> RegenerateSettings:
    """Six good samples, and a missing image, a broken line and an id that was there before."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"never opened here")
    lines = [json.dumps(record(f"s{number}")) for number in range(COUNT)]
    lines += [json.dumps(record("lost", image="none.png")), "{broken", lines[0]]
    source = tmp_path / "in" / "data.jsonl"
    source.write_text("\n".join(lines) + "\n")
    return RegenerateSettings(
        target="some/target", input=source, output=tmp_path / "out" / "data.jsonl"
    )
