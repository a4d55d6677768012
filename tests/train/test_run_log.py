"""What a run shows and tells trackers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.tiny_store import TinyStore
from tests.train.runs import recipe, run
from vllm_vispec.train import loop
from vllm_vispec.train.acceptance import _answer, replay
from vllm_vispec.utils.errors import ViSpecError


class FakeTracker:
    """Stands for the packages of all trackers."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: dict[str, list[tuple[int, float]]] = {}
        self.closed = 0

    def init(self, **settings: Any) -> FakeTracker:
        self.started.append(settings)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.add_scalar(name, value, step)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.logged.setdefault(name, []).append((step, value))

    def finish(self) -> None:
        self.closed += 1

    close = finish


def test_trackers_get_the_numbers(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = {name: FakeTracker() for name in ("wandb", "trackio", "tensorboard")}
    board = SimpleNamespace(SummaryWriter=lambda _: fakes["tensorboard"])
    monkeypatch.setitem(sys.modules, "wandb", fakes["wandb"])
    monkeypatch.setitem(sys.modules, "trackio", fakes["trackio"])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    config = recipe(tiny.target("llava"), dialogues, tmp_path / "run", schedule__max_steps=3,
                    run__validate_every=2, run__trackers=[*fakes], run__project="mine")  # fmt: skip
    run(config)
    for fake in fakes.values():
        assert [step for step, _ in fake.logged["train/loss"]] == [1, 2, 3]
        lengths = fake.logged["validation/acceptance_length/overall"]
        assert [step for step, _ in lengths] == [2, 3]
        assert fake.closed == 1
    for name in ("wandb", "trackio"):
        (started,) = fakes[name].started
        assert (started["project"], started["name"], started["resume"]) == ("mine", "run", "allow")
        assert started["config"]["schedule.max_steps"] == 3


def test_a_login_is_missed_before_samples_are_encoded(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setattr(loop, "open_teacher", lambda *_, **__: pytest.fail("samples are encoded"))
    config = recipe(tiny.target("llava"), dialogues, tmp_path / "run", run__trackers=["wandb"])
    with pytest.raises(ViSpecError, match=r"run.trackers wandb cannot start \(no API key\)"):
        run(config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", r"cannot be imported \(.*pip install wandb"),
        ("wand", "unknown: use some of trackio, "),
    ],
)
def test_a_tracker_that_is_not_there(
    tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    # Before data or a target are looked at: there are none.
    config = recipe(tmp_path, tmp_path / "no.jsonl", tmp_path / "run", run__trackers=[name])
    with pytest.raises(ViSpecError, match=message):
        run(config)


def test_what_is_shown(
    tiny: TinyStore, dialogues: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(tiny.target("llava"), dialogues, tmp_path / "run", run__show_drafts=2,
                    schedule__max_steps=0, schedule__minutes=0.01)  # fmt: skip
    run(config)
    found = capsys.readouterr()
    shown = [line for line in found.out.splitlines() if line.startswith("sample-")]
    assert len(shown) == 2
    assert "GB: at each best validation and at the end; the best and the newest 2" in found.out
    assert "tokens_per_second=" in found.err
    assert "left=" in found.err


def test_accepted_and_rejected_tokens() -> None:
    """Rows of pass s propose token p + 2; here one is right, then none."""
    ids = [9, 10, 11, 12, 13, 14]
    drafted = [[11, 12, 7, 7, -1, -1], [-1, 8, 13, 8, -1, -1]]
    gold = [*ids[2:], 0, 0]
    hits = [[token == right for token, right in zip(row, gold, strict=True)] for row in drafted]
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(f" {one}" for one in ids))
    text = _answer(ids, 1, len(ids), drafted, hits, tokenizer)
    assert replay(hits, 1, len(ids)) == [1, 0, 0]
    assert text.plain == " 10 11[ 8] 12[ 7] 13[ 7] 14"
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles[" 11"] == "green"
    assert styles["[ 8]"] == "red"
