"""Settings that cannot have their effect are named in the log, one line each."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator

from tests.support.heads import BASE
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.spec_decode import speculator as v2
from vllm_vispec.spec_decode.options import EngineOptions
from vllm_vispec.spec_decode.setting_notes import note_settings_without_effect


class DraftConfig(SimpleNamespace):
    """The draft's configuration, as far as it is read."""

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def engine(
    *,
    schedule: list[list[int]] | None = None,
    table: int = 1024,
    has_adaptor: bool = True,
    takes_images: bool = True,
    tree: dict[str, Any] | None = None,
) -> Any:
    values = asdict(BASE) if has_adaptor else asdict(BASE) | {"compress": False}
    values |= {} if has_adaptor else {"global_feature": False}
    head = HeadConfig(**values)
    section = EngineOptions(image_table_size=table, tree=tree).to_section()
    draft = DraftConfig(**head.to_llama_config_dict(), **section)
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            num_speculative_tokens=5,
            num_speculative_tokens_per_batch_size=schedule,
            draft_model_config=SimpleNamespace(hf_config=draft),
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=16),
        model_config=SimpleNamespace(supports_multimodal_inputs=takes_images),
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, []),
        ({"schedule": [[1, 8, 5], [9, 64, 0]], "table": 64}, []),
        (
            {"schedule": [[1, 8, 7], [9, 16, 2]]},
            ["[1, 8, 7] of num_speculative_tokens_per_batch_size drafts 5 tokens"],
        ),
        ({"schedule": [[1, 16, 5], [17, 32, 0]]}, ["is never used, since max_num_seqs=16"]),
        ({"table": 64, "has_adaptor": False}, ["this head keeps no rows of images"]),
        ({"table": 64, "takes_images": False}, ["this engine takes no images"]),
        ({"tree": {"depth": 3}}, []),
        ({"tree": {"depth": 4}}, ["no load drafts more than the 5 tokens of one path"]),
        ({"tree": {"depth": 4, "policy": "entropy", "top_k": 1}}, []),
    ],
)
def test_each_is_named_in_a_line(
    settings: dict[str, Any], said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    note_settings_without_effect(engine(**settings))
    assert len(caplog.messages) == len(said)
    for message, part in zip(caplog.messages, said, strict=True):
        assert message.startswith("speculative config: ")
        assert part in message


@pytest.mark.parametrize(
    ("mode", "says"),
    [("NONE", False), ("PIECEWISE", True), ("FULL_AND_PIECEWISE", False), ("FULL", False)],
)
def test_draft_steps_without_graphs_are_named_once(
    mode: str, says: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EagleSpeculator, "init_cudagraph_manager", lambda self, mode: None)
    v2._note_eager_steps.cache_clear()
    speculator = object.__new__(v2.ViSpecSpeculator)
    for _ in range(2):
        speculator.init_cudagraph_manager(CUDAGraphMode[mode])
    assert len(caplog.messages) == says
    assert not says or f"cudagraph_mode={mode}" in caplog.messages[0]
