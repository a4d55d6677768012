"""The table of target families, and what it recommends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.more_families import ALL_FAMILIES, REFUSED
from vllm_vispec.heads.families import embedding_scale, families, recommend


def config(model_type: str, **text: Any) -> Any:
    found = SimpleNamespace(**{"hidden_size": 4096, **text})
    return SimpleNamespace(model_type=model_type, get_text_config=lambda: found)


def test_what_is_called_tested_has_a_tiny_model() -> None:
    listed = {family.types[0]: family for family in families()}
    assert {kind for kind, family in listed.items() if family.tested} <= ALL_FAMILIES.keys()
    assert ALL_FAMILIES.keys() <= listed.keys()
    assert {kind for kind in ALL_FAMILIES if listed[kind].refused} == set(REFUSED)


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        (config("qwen3_5", mtp_num_hidden_layers=1), "its own MTP layers"),
        (config("new_family", num_nextn_predict_layers=1), "MTP layers, if vLLM serves this"),
        # vLLM knows no MTP layers of it, nor does our training take it.
        (config("kimi_k25", num_nextn_predict_layers=1), "n-gram where answers repeat"),
        (config("qwen2_5_vl", hidden_size=3584), "ViSpec head JLKang/ViSpec-Qwen2.5-VL-7B"),
        (config("qwen3_vl"), "a draft that vLLM serves by itself"),
        (config("qwen2_vl", hidden_size=3584), "the sibling Qwen/Qwen2-VL-2B-Instruct"),
        (config("qwen2_vl", hidden_size=1536), "train a ViSpec head"),
        (config("gemma3"), "n-gram where answers repeat the prompt"),
        (config("new_family"), "nobody tested this family"),
    ],
)
def test_recommended(target: Any, wanted: str) -> None:
    assert wanted in recommend(target)


def test_only_some_families_scale_embeddings() -> None:
    assert embedding_scale("gemma4", 64) == 8
    assert embedding_scale("qwen2_vl", 64) == embedding_scale("new_family", 64) == 1
