"""The configuration of draft VLMs: what they consist of, what is written, what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.heads import BASE, DRAFT_VLM, TYPICAL, edit_config, write_config, write_draft_vlm
from vllm_vispec.bench.roofline import draft_shape, target_shape
from vllm_vispec.cli.doctor import head_lines
from vllm_vispec.heads.config import DRAFT_VLM_ARCHITECTURE, HeadConfig
from vllm_vispec.heads.export import convert_head
from vllm_vispec.heads.folder import inspect_head
from vllm_vispec.reference import tensor_shapes
from vllm_vispec.utils.errors import ViSpecError


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_a_folder_is_read_as_it_was_written(tmp_path: Path, tied: bool, qkv_bias: bool) -> None:
    written = write_draft_vlm(tmp_path, tie_word_embeddings=tied, qkv_bias=qkv_bias)
    info = inspect_head(tmp_path)
    assert info.config == written
    assert info.config.is_draft_vlm
    assert ("lm_head.weight" in info.shapes) != tied
    assert ("layers.0.self_attn.q_proj.bias" in info.shapes) == qkv_bias


def test_tensors_of_a_draft_vlm() -> None:
    shapes = tensor_shapes(DRAFT_VLM)
    parts = Counter(name.split(".")[0] for name in shapes)
    assert set(parts) == {"embed_tokens", "projector", "layers", "norm", "lm_head"}
    assert {name.split(".")[1] for name in shapes if name.startswith("layers.")} == set("012")
    assert shapes["projector.linear_1.weight"] == (24, 32)
    assert shapes["projector.linear_2.weight"] == (24, 24)
    assert shapes["layers.2.self_attn.k_proj.weight"] == (8, 24)
    assert shapes["layers.1.input_layernorm.weight"] == (24,)
    assert shapes["lm_head.weight"] == (64, 24)


def test_the_config_that_vllm_reads() -> None:
    content = DRAFT_VLM.to_config_json("bfloat16")
    assert content["architectures"] == [DRAFT_VLM_ARCHITECTURE]
    assert content["num_hidden_layers"] == 3
    assert content["hidden_size"] == 24
    assert content["vispec"]["format_version"] == 3
    assert content["vispec"]["vision_size"] == 32
    assert HeadConfig.from_config_json(content) == DRAFT_VLM


def test_other_heads_are_written_as_before() -> None:
    section = TYPICAL["canonical"].vispec_section()
    assert section["format_version"] == 1
    assert not {"vision_size", "num_hidden_layers", "tie_word_embeddings"} & set(section)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress": True}, "compress of the head is True, in a draft VLM"),
        ({"global_feature": True}, "global_feature of the head is True, in a draft VLM"),
        ({"num_query_tokens": 2}, "num_query_tokens of the head is 2, in a draft VLM"),
        ({"fc_bias": True}, "fc_bias of the head is True, in a draft VLM"),
        ({"layer0_input_norm": False}, "layer0_input_norm of the head is False, in a draft VLM"),
        ({"final_norm": False}, "final_norm of the head is False, in a draft VLM"),
        ({"has_embed_tokens": False}, "has_embed_tokens of the head is False, in a draft VLM"),
        ({"num_hidden_layers": 0}, "num_hidden_layers of the head is 0"),
        ({"vision_size": -1}, "vision_size of the head is -1"),
        ({"vision_size": True}, "vision_size of the head is True"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings of the head is 'no'"),
        ({"vision_size": 0}, "num_hidden_layers of the head is 3, in a head without vision_size"),
        ({"num_key_value_heads": 2}, "does not divide num_attention_heads=3"),
    ],
)
def test_impossible_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ViSpecError, match=message):
        replace(DRAFT_VLM, **changes)


def test_a_layer_too_few(tmp_path: Path) -> None:
    write_draft_vlm(tmp_path)
    section = DRAFT_VLM.vispec_section()
    edit_config(tmp_path, vispec=section | {"num_hidden_layers": 4}, num_hidden_layers=4)
    with pytest.raises(ViSpecError, match=r"lacks 12 tensor\(s\): layers\.3\."):
        inspect_head(tmp_path)


def test_convert_keeps_it(tmp_path: Path) -> None:
    written = write_draft_vlm(tmp_path / "a")
    info = convert_head(tmp_path / "a", tmp_path / "b", target="org/target")
    assert info.config == written
    assert "draft VLM" in (tmp_path / "b" / "README.md").read_text()
    with pytest.raises(ViSpecError, match="cannot express this head"):
        convert_head(tmp_path / "a", tmp_path / "c", checkpoint_format="reference")


def test_the_estimate_counts_its_layers_and_its_own_lm_head(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    sizes = BASE.to_config_json("float32") | {"num_hidden_layers": 6}
    write_config(tmp_path / "target", sizes)
    write_draft_vlm(tmp_path / "draft")
    found = draft_shape(tmp_path / "draft", tmp_path / "target")
    layer = 24 * (2 * 24 + 2 * 8 + 3 * 48)
    assert found.token_parameters == 3 * layer
    assert found.row_parameters == 24 * 64
    assert target_shape(tmp_path / "target").token_parameters > found.token_parameters


def test_the_doctor_says_what_it_is(tmp_path: Path) -> None:
    write_draft_vlm(tmp_path)
    text = "\n".join(head_lines(str(tmp_path)))
    assert "a draft VLM for image embeddings of 32" in text
