"""Heads of every dialect are recognised, checked and converted."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from tests.support.heads import TYPICAL, edit_config, edit_tensors, random_tensors, write_head
from vllm_vispec.heads import (
    DIALECTS,
    Dialect,
    check_against_target,
    get_dialect,
    inspect_head,
    iter_canonical_tensors,
    register_dialect,
    resolve_head,
)
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.convert import convert_head
from vllm_vispec.reference import ViSpecDraft
from vllm_vispec.utils.errors import ViSpecError

NAMES = sorted(TYPICAL)


def same_weights(folder: Path, head: HeadConfig) -> None:
    found = dict(iter_canonical_tensors(folder))
    want = random_tensors(head)
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dialect", NAMES)
def test_inspect_recognises_dialect(tmp_path: Path, dialect: str) -> None:
    head = write_head(tmp_path, dialect)
    info = inspect_head(tmp_path)
    assert info.dialect == dialect
    assert info.config == head
    assert info.shapes == head.tensor_shapes()
    assert info.dtype == "F32"
    same_weights(tmp_path, head)


@pytest.mark.parametrize("num_query_tokens", [1, 2, 5])
@pytest.mark.parametrize("dialect", NAMES)
def test_number_of_queries_comes_from_the_weights(
    tmp_path: Path, dialect: str, num_query_tokens: int
) -> None:
    write_head(tmp_path, dialect, num_query_tokens=num_query_tokens)
    config = inspect_head(tmp_path).config
    assert config.num_query_tokens == num_query_tokens
    assert config.rows_per_image == num_query_tokens - 1


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("fc_bias", [True, False])
@pytest.mark.parametrize("dialect", NAMES)
def test_bias_flags(tmp_path: Path, dialect: str, qkv_bias: bool, fc_bias: bool) -> None:
    head = write_head(tmp_path, dialect, qkv_bias=qkv_bias, fc_bias=fc_bias)
    assert inspect_head(tmp_path).config == head


def test_reference_defaults(tmp_path: Path) -> None:
    """LLaVA configs lack qkv_bias, rope_theta and bias."""
    write_head(tmp_path, "reference", qkv_bias=False, target_model_type="llava_next")
    edit_config(tmp_path, qkv_bias=None, rope_theta=None, bias=None, num_key_value_heads=None)
    config = inspect_head(tmp_path).config
    assert (config.qkv_bias, config.fc_bias, config.rope_theta) == (False, True, 10000.0)
    assert config.num_key_value_heads == config.num_attention_heads
    assert (config.layer0_input_norm, config.final_norm) == (False, False)


def test_reference_with_nested_text_config(tmp_path: Path) -> None:
    head = write_head(tmp_path, "reference")
    flat = json.loads((tmp_path / "config.json").read_text())
    flat["text_config"] = {"model_type": "qwen2_5_vl_text", "hidden_size": flat.pop("hidden_size")}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert inspect_head(tmp_path).config == head


def test_mrope_of_the_target_is_not_inherited(tmp_path: Path) -> None:
    head = write_head(tmp_path, "reference")
    edit_config(tmp_path, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]})
    assert inspect_head(tmp_path).config == head


def test_automodel_flags_switch_norms_off(tmp_path: Path) -> None:
    """Later exports follow the reference; unused norm weights may still be there."""
    write_head(tmp_path, "automodel")
    edit_config(tmp_path, draft_skip_first_input_norm=True, draft_apply_final_norm=False)
    info = inspect_head(tmp_path)
    assert (info.config.layer0_input_norm, info.config.final_norm) == (False, False)
    assert "norm.weight" not in info.shapes


def test_automodel_without_norm_weights(tmp_path: Path) -> None:
    head = write_head(tmp_path, "automodel", layer0_input_norm=False, final_norm=False)
    assert inspect_head(tmp_path).config == head


def test_head_dim_apart_from_hidden_size(tmp_path: Path) -> None:
    """Qwen3-VL has head_dim != hidden / heads; the adaptor keeps hidden / heads."""
    head = write_head(tmp_path, "automodel", head_dim=16, num_key_value_heads=2)
    info = inspect_head(tmp_path)
    assert info.config == head
    assert info.shapes["img_adaptor.query"] == (3, 4, 8)
    assert info.shapes["layer.self_attn.q_proj.weight"] == (64, 32)


def test_head_without_embedding_table(tmp_path: Path) -> None:
    head = write_head(tmp_path, "reference", has_embed_tokens=False)
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


def test_inspection_imports_neither_torch_nor_vllm(tmp_path: Path) -> None:
    write_head(tmp_path)
    code = (
        "import sys; from vllm_vispec.heads import inspect_head; "
        f"inspect_head({str(tmp_path)!r}); "
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("dialect", NAMES)
def test_convert_round_trip(tmp_path: Path, dialect: str) -> None:
    head = write_head(tmp_path / "source", dialect)
    info = convert_head(tmp_path / "source", tmp_path / "out" / "head")
    assert info.dialect == "canonical"
    assert info == inspect_head(tmp_path / "out" / "head")
    assert info.config == head.with_dialect("canonical")
    same_weights(info.folder, head)
    assert sorted(p.name for p in info.folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert [p.name for p in info.folder.parent.iterdir()] == ["head"]
    card = (info.folder / "README.md").read_text()
    assert f'"method":"vispec","model":"{info.folder}"' in card
    assert "vllm serve TARGET " in card


def test_convert_to_bfloat16_without_embeddings(tmp_path: Path) -> None:
    write_head(tmp_path / "source", "reference")
    out = tmp_path / "out"
    info = convert_head(tmp_path / "source", out, dtype="bfloat16", drop_embed_tokens=True)
    assert info.dtype == "BF16"
    assert not info.config.has_embed_tokens
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for _, t in iter_canonical_tensors(out)} == {torch.bfloat16}


def test_convert_refuses_to_overwrite(tmp_path: Path) -> None:
    write_head(tmp_path / "source")
    out = tmp_path / "out"
    convert_head(tmp_path / "source", out)
    with pytest.raises(ViSpecError, match="exists: choose another or add --overwrite"):
        convert_head(tmp_path / "source", out)
    convert_head(tmp_path / "source", out, overwrite=True)
    with pytest.raises(ViSpecError, match="is the source"):
        convert_head(out, out, overwrite=True)


def test_convert_never_deletes_foreign_files(tmp_path: Path) -> None:
    write_head(tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ViSpecError, match="would delete its files"):
        convert_head(tmp_path / "source", out, overwrite=True)
    assert (out / "thesis.txt").read_text() == "mine"


def test_failed_convert_leaves_nothing(tmp_path: Path) -> None:
    write_head(tmp_path / "source")
    edit_tensors(tmp_path / "source", lambda tensors: tensors.pop("fc.bias"))
    with pytest.raises(ViSpecError):
        convert_head(tmp_path / "source", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    with pytest.raises(ViSpecError, match="--dtype 'int8' is not supported"):
        convert_head(tmp_path / "source", tmp_path / "out", dtype="int8")


@pytest.mark.parametrize("dialect", NAMES)
def test_config_is_a_plain_llama_config(dialect: str) -> None:
    head = TYPICAL[dialect]
    config = LlamaConfig(**head.to_llama_config_dict())
    assert config.architectures == ["EagleViSpecForCausalLM"]
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": head.rope_theta}
    assert (config.num_hidden_layers, config.head_dim) == (1, head.head_dim)
    # vLLM's Llama layer: qkv_bias decides on q/k/v, attention_bias on o_proj.
    assert (config.qkv_bias, config.attention_bias) == (head.qkv_bias, False)
    assert HeadConfig.from_config_json(config.to_dict()) == head.with_dialect("canonical")


def test_resolve_prefers_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_head(tmp_path / "org" / "name")
    assert resolve_head("org/name") == Path("org/name")


def test_resolve_fetches_no_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fetch(repo_id: str, **kwargs: object) -> str:
        calls.append((repo_id, kwargs))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert resolve_head("org/head", revision="v1") == tmp_path
    patterns = ["*.json", "*.safetensors"]
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


def test_a_dialect_is_a_table_and_two_functions(tmp_path: Path) -> None:
    """The README's recipe for a new dialect works."""
    reference = get_dialect("reference")
    toy = Dialect(
        name="toy",
        summary="a test",
        keys={f"toy.{ours}": ours for ours in TYPICAL["reference"].tensor_shapes()},
        detect=lambda config, shapes: "toy.fc.weight" in shapes,
        head_config=lambda config, shapes: replace(TYPICAL["reference"], dialect="toy"),
    )
    register_dialect(toy)
    try:
        head = write_head(tmp_path, "reference")

        def rename(tensors: dict[str, torch.Tensor]) -> None:
            for name in list(tensors):
                tensors[f"toy.{reference.canonical_name(name)}"] = tensors.pop(name)

        edit_tensors(tmp_path, rename)
        assert inspect_head(tmp_path).config == head.with_dialect("toy")
        with pytest.raises(ViSpecError, match="registered already"):
            register_dialect(toy)
    finally:
        DIALECTS.pop("toy")
    with pytest.raises(ViSpecError, match="unknown dialect 'toy': use one of canonical"):
        get_dialect("toy")


@pytest.mark.parametrize("dialect", NAMES)
def test_draft_loads_every_dialect(tmp_path: Path, dialect: str) -> None:
    head = write_head(tmp_path, dialect)
    draft = ViSpecDraft.from_folder(tmp_path, torch.bfloat16)
    assert {name for name, _ in draft.named_parameters()} == head.tensor_shapes().keys()
    assert draft.fc.weight.dtype == torch.bfloat16
