"""Heads of every checkpoint format are recognised and read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from tests.support.heads import TYPICAL, edit_config, edit_tensors, random_tensors, write_head
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.folder import inspect_head, iter_canonical_tensors, load_draft
from vllm_vispec.heads.formats import FORMATS, CheckpointFormat, get_format
from vllm_vispec.heads.location import resolve_head
from vllm_vispec.heads.target import check_against_target
from vllm_vispec.reference import tensor_shapes
from vllm_vispec.utils.errors import ViSpecError

EACH_FORMAT = pytest.mark.parametrize("name", sorted(TYPICAL))


def same_weights(folder: Path, head: HeadConfig) -> None:
    found, wanted = dict(iter_canonical_tensors(inspect_head(folder))), random_tensors(head)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *({"num_query_tokens": count} for count in (1, 2, 5)),
        *({"qkv_bias": a, "fc_bias": b} for a in (True, False) for b in (True, False)),
        {"has_embed_tokens": False},
    ],
)
@EACH_FORMAT
def test_a_head_is_read_as_it_was_written(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    """Number of queries and biases follow from the weights where config.json does not say them."""
    head = write_head(tmp_path, name, **changes)
    info = inspect_head(tmp_path)
    assert (info.checkpoint_format, info.config, info.dtype) == (name, head, "F32")
    assert info.shapes == tensor_shapes(head)
    assert info.config.rows_per_image == head.num_query_tokens - 1
    same_weights(tmp_path, head)
    draft = load_draft(tmp_path, torch.bfloat16)
    assert {name for name, _ in draft.named_parameters()} == tensor_shapes(head).keys()
    assert draft.fc.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes",
    [
        {"layer0_input_norm": False, "final_norm": False},
        # Qwen3-VL: the adaptor keeps hidden / heads.
        {"head_dim": 16, "num_key_value_heads": 2},
    ],
)
def test_automodel_variants(tmp_path: Path, changes: dict[str, Any]) -> None:
    head = write_head(tmp_path, "automodel", **changes)
    info = inspect_head(tmp_path)
    assert info.config == head
    assert info.shapes["img_adaptor.query"] == (3, 4, 8)
    assert info.shapes["layer.self_attn.q_proj.weight"] == (4 * head.head_dim, 32)


def test_automodel_flags_switch_norms_off(tmp_path: Path) -> None:
    """Later exports follow the reference; unused norm weights may still be there."""
    write_head(tmp_path, "automodel")
    edit_config(tmp_path, draft_skip_first_input_norm=True, draft_apply_final_norm=False)
    info = inspect_head(tmp_path)
    assert (info.config.layer0_input_norm, info.config.final_norm) == (False, False)
    assert "norm.weight" not in info.shapes


def test_reference_defaults(tmp_path: Path) -> None:
    """LLaVA configs lack qkv_bias, rope_theta and bias."""
    write_head(tmp_path, "reference", qkv_bias=False, target_model_type="llava_next")
    edit_config(tmp_path, qkv_bias=None, rope_theta=None, bias=None, num_key_value_heads=None)
    config = inspect_head(tmp_path).config
    assert (config.qkv_bias, config.fc_bias, config.rope_theta) == (False, True, 10000.0)
    assert config.num_key_value_heads == config.num_attention_heads
    assert (config.layer0_input_norm, config.final_norm) == (False, False)


def test_reference_configs_that_resemble_the_target(tmp_path: Path) -> None:
    """Its M-RoPE is not inherited, and its sizes may be in a section for the text model."""
    head = write_head(tmp_path, "reference")
    edit_config(tmp_path, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]})
    assert inspect_head(tmp_path).config == head
    nested = {"model_type": "qwen2_5_vl_text", "hidden_size": head.hidden_size}
    edit_config(tmp_path, text_config=nested, hidden_size=None)
    assert inspect_head(tmp_path).config == head


def test_sharded_weights(tmp_path: Path) -> None:
    head = write_head(tmp_path, "reference")
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert len(inspect_head(tmp_path).files) == 2
    same_weights(tmp_path, head)


def test_inspection_imports_little(tmp_path: Path) -> None:
    """Torch declares the tensors, but nothing of it that takes seconds to import is used."""
    write_head(tmp_path)
    code = (
        "import sys; from vllm_vispec.heads.folder import inspect_head; "
        f"inspect_head({str(tmp_path)!r}); "
        "print([m for m in ('torch._dynamo', 'vllm', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


@EACH_FORMAT
def test_config_is_a_plain_llama_config(name: str) -> None:
    head = TYPICAL[name]
    config = LlamaConfig(**head.to_llama_config_dict())
    assert config.architectures == ["EagleViSpecForCausalLM"]
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": head.rope_theta}
    assert (config.num_hidden_layers, config.head_dim) == (1, head.head_dim)
    # vLLM's Llama layer: qkv_bias decides on q/k/v, attention_bias on o_proj.
    assert (config.qkv_bias, config.attention_bias) == (head.qkv_bias, False)
    assert HeadConfig.from_config_json(config.to_dict()) == head


def test_a_local_folder_comes_first_and_no_pickles_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fetch(repo_id: str, **kwargs: object) -> str:
        calls.append((repo_id, kwargs))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    write_head(tmp_path / "org" / "name")
    assert resolve_head("org/name") == Path("org/name")
    assert resolve_head("org/head", revision="v1") == tmp_path
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    assert calls == [("org/head", {"revision": "v1", "allow_patterns": patterns})]


def test_check_against_target() -> None:
    head = TYPICAL["reference"]
    assert check_against_target(head, 32, 64, "qwen2_5_vl") is None
    assert "acceptance may be low" in str(check_against_target(head, 32, 64, "some_vl"))
    with pytest.raises(ViSpecError, match="trained for qwen2_5_vl, the target is llava: use the"):
        check_against_target(head, 32, 64, "llava")
    with pytest.raises(ViSpecError, match="hidden_size of the head is 32"):
        check_against_target(head, 48, 64, "qwen2_5_vl")
    with pytest.raises(ViSpecError, match="vocab_size of the head is 64"):
        check_against_target(head, 32, 65)


def test_a_format_is_a_table_and_two_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe for a new format works."""
    reference, head = get_format("reference"), write_head(tmp_path, "reference")
    toy = CheckpointFormat(
        name="toy",
        summary="a test",
        keys={f"toy.{ours}": ours for ours in tensor_shapes(head)},
        detect=lambda config, shapes: "toy.fc.weight" in shapes,
        read_config=lambda config, shapes: head,
    )
    monkeypatch.setitem(FORMATS, "toy", toy)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"toy.{reference.canonical_name(name)}"] = tensors.pop(name)

    edit_tensors(tmp_path, rename)
    info = inspect_head(tmp_path)
    assert (info.checkpoint_format, info.config) == ("toy", head)
    with pytest.raises(ViSpecError, match="unknown checkpoint format 'tox': use one of canonical"):
        get_format("tox")
