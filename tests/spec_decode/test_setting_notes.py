"""Settings that are refused, or that cannot have their effect and are named in the log."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator

from tests.support.heads import BASE
from vllm_vispec.config import ViSpecConfig
from vllm_vispec.heads.target import tensor_parallel_sizes
from vllm_vispec.spec_decode import speculator as v2
from vllm_vispec.spec_decode.checks import check_keys
from vllm_vispec.spec_decode.setting_notes import describe_drafts, note_settings_without_effect
from vllm_vispec.utils.errors import ViSpecError


def engine(
    *,
    schedule: list[list[int]] | None = None,
    table: int | None = None,
    has_adaptor: bool = True,
    takes_images: bool = True,
    tree: dict[str, Any] | None = None,
    adaptive: bool = False,
    tokens: int = 5,
    hybrid: int | None = None,
) -> Any:
    head = BASE if has_adaptor else replace(BASE, compress=False, global_feature=False)
    content = head.to_llama_config_dict()
    draft = SimpleNamespace(**content, to_dict=lambda: content)
    config = ViSpecConfig.pop_from({"image_table_size": table, "tree": tree, "adaptive": adaptive})
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            num_speculative_tokens=tokens,
            num_speculative_tokens_per_batch_size=schedule,
            draft_model_config=SimpleNamespace(hf_config=draft),
        ),
        additional_config=config.to_section(),
        scheduler_config=SimpleNamespace(max_num_seqs=16, async_scheduling=False),
        use_v2_model_runner=False,
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        model_config=SimpleNamespace(
            supports_multimodal_inputs=takes_images,
            is_hybrid=hybrid is not None,
            get_num_kv_heads=lambda parallel: hybrid,
            get_head_size=lambda: BASE.head_dim,
        ),
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
        ({"hybrid": 4}, []),
        ({"hybrid": 1}, ["this head keeps 4.0 times as much for a token"]),
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
    ("settings", "said"),
    [
        ({}, "chains of 5 tokens"),
        ({"tree": {"top_k": 4}}, "trees of 5 nodes on 4 levels (eagle2, depth 3, top_k 4)"),
        (
            {"tree": {"policy": "entropy", "top_k": 1, "depth": 4}},
            "chains of 5 tokens (entropy, may end early)",
        ),
        (
            {"adaptive": True},
            "chains of up to 5 tokens, fewer or none where that is faster (adaptive)",
        ),
        (
            {"adaptive": True, "tree": {}, "tokens": 29},
            "trees of 29 nodes on 4 levels (eagle2, depth 3, top_k 8), or nothing where that is"
            " faster (adaptive)",
        ),
        (
            {"schedule": [[1, 8, 29], [9, 16, 4], [17, 64, 0]], "tree": {}, "tokens": 29},
            "trees of 29 nodes on 4 levels (eagle2, depth 3, top_k 8) with 1 to 8 requests,"
            " chains of 4 tokens with 9 to 16 requests, nothing with 17 to 64 requests",
        ),
    ],
)
def test_what_is_drafted_is_one_line(settings: dict[str, Any], said: str) -> None:
    assert describe_drafts(engine(**settings)) == said


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


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sizes"),
    [
        (4, 4, [1, 2, 4]),
        (4, 1, [1, 2, 4]),
        (16, 2, [1, 2, 4, 8, 16]),
        (28, 4, [1, 2, 4, 28]),
        (12, 3, [1, 3, 6, 12]),
    ],
)
def test_key_value_heads_are_divided_or_repeated(
    heads: int, kv_heads: int, sizes: list[int]
) -> None:
    head = replace(
        BASE, hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    assert tensor_parallel_sizes(head) == sizes


@pytest.mark.parametrize("filled_by_vllm", ["target_model_config", "draft_parallel_config"])
def test_known_keys(filled_by_vllm: str) -> None:
    known = {"method": "vispec", "model": "m", "num_speculative_tokens": 4, "tree": {}}
    check_keys(known)
    with pytest.raises(ViSpecError, match=f'key "{filled_by_vllm}" is unknown'):
        check_keys(known | {filled_by_vllm: None})


def test_only_commands_of_vllm_lose_their_traceback() -> None:
    import vllm

    from vllm_vispec.compat.command_errors import is_vllm_command

    package = Path(vllm.__file__).parent
    assert is_vllm_command(["/usr/bin/vllm", "serve"])
    assert is_vllm_command([str(package / "entrypoints" / "openai" / "api_server.py")])
    for program in ("my_job.py", "-c", sys.executable):
        assert not is_vllm_command([program])
    assert not is_vllm_command([])
