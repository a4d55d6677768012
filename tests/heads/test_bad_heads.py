"""Every unusable head is refused with one line that names the fault and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.heads import BASE, TYPICAL, edit_config, edit_tensors, write_config, write_head
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.folder import inspect_head
from vllm_vispec.heads.location import resolve_head
from vllm_vispec.utils.errors import ViSpecError

Spoil = Callable[[Path], object]


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def _bytes(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: _weights(folder).write_bytes(change(_weights(folder).read_bytes()))


def _pop(*names: str) -> Spoil:
    return lambda folder: edit_tensors(folder, lambda found: [found.pop(name) for name in names])


def _put(name: str, tensor: torch.Tensor) -> Spoil:
    return lambda folder: edit_tensors(folder, lambda found: found.update({name: tensor}))


def _config(**changes: Any) -> Spoil:
    return lambda folder: edit_config(folder, **changes)


def _text(name: str, content: str) -> Spoil:
    return lambda folder: (folder / name).write_text(content)


def _only(architecture: str, tensors: dict[str, torch.Tensor], **config: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        write_config(folder, {"architectures": [architecture], **config})
        save_file(tensors, _weights(folder))

    return spoil


def _two_files(folder: Path) -> None:
    data = _weights(folder).read_bytes()
    _weights(folder).unlink()
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(data)


D = BASE.hidden_size
_EAGLE = {"fc.weight": torch.zeros(D, 2 * D), "layers.0.mlp.up_proj.weight": torch.zeros(48, D)}
_EAGLE3 = {"fc.weight": torch.zeros(D, 3 * D), "d2t": torch.zeros(8)}
_FULL = {f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(2, 2) for i in range(6)}
_INDEX = json.dumps({"weight_map": {"fc.weight": "gone.safetensors"}})

REFERENCE: dict[str, tuple[Spoil, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "config is no JSON": (_text("config.json", "{"), "cannot be read as JSON"),
    "no weights": (lambda f: _weights(f).unlink(), r"no \*\.safetensors"),
    "pickle only": (
        lambda f: _weights(f).rename(f / "pytorch_model.bin"),
        "only pickle weights .*convert them to safetensors",
    ),
    "truncated": (
        _bytes(lambda data: data[: len(data) // 2]),
        "truncated or corrupt.*download or export the head again",
    ),
    "tensor twice": (_two_files, r"is in both a\.safetensors and b\.safetensors"),
    "shard missing": (
        _text("model.safetensors.index.json", _INDEX),
        r"lacks gone\.safetensors",
    ),
    "missing tensors": (
        _pop("fc.weight", "layers.0.mlp.up_proj.weight"),
        r"lacks 2 tensor\(s\): fc\.weight, layers\.0\.mlp\.up_proj\.weight",
    ),
    "no queries": (_pop("imadpt.q"), r"lacks tensor 'imadpt\.q'"),
    "extra tensor": (_put("lm_head.weight", torch.zeros(64, D)), r"account for: lm_head\.weight"),
    "two layers": (
        _put("layers.1.mlp.up_proj.weight", torch.zeros(48, D)),
        "has 2 decoder layers",
    ),
    "wrong shape": (
        _put("fc.weight", torch.zeros(D, D)),
        r"tensor 'fc\.weight'.* has shape \[32, 32\], config\.json asks for \[32, 64\]",
    ),
    "quantised": (
        _put("fc.weight", torch.zeros(D, 2 * D, dtype=torch.int8)),
        "dtype I8: only unquantised",
    ),
    "flat queries": (_put("imadpt.q", torch.zeros(3, 32)), r"has shape \[3, 32\]"),
    "hidden size is text": (_config(hidden_size="32"), "hidden_size .*must be an integer"),
    "kv heads do not divide": (_config(num_key_value_heads=3), "num_key_value_heads=3"),
    "flag is text": (_config(qkv_bias="yes"), "qkv_bias .*true or false"),
    "scaled rope": (_config(rope_scaling={"rope_type": "yarn"}), "'yarn' RoPE"),
    "plain EAGLE": (
        _only("LlamaForCausalLM", _EAGLE),
        '"checkpoint_format":"msd".*"method":"eagle"',
    ),
    "EAGLE-3": (
        _only("LlamaForCausalLMEagle3", _EAGLE3),
        'EAGLE-3 head.*"method":"eagle3"',
    ),
    "speculators": (
        _only("LlamaForCausalLM", _EAGLE, speculators_model_type="eagle"),
        "a head in the speculators format, serve it with vLLM",
    ),
    "whole model": (
        _only("X", _FULL),
        r"whole model \(X\); .* a published model that this vLLM serves",
    ),
    "unknown format": (
        _only("MyHead", {"w": torch.zeros(2)}),
        r"unknown checkpoint format \(architectures \['MyHead'\], tensors w\): expected one of "
        "canonical, automodel, reference",
    ),
}

AUTOMODEL: dict[str, tuple[Spoil, str]] = {
    "stated queries differ": (
        _config(vispec_num_query_tokens=7),
        "vispec_num_query_tokens .* is 7, but 'img_adaptor.query' holds 3: set it to 3",
    ),
}


def _section(**changes: Any) -> Spoil:
    return _config(vispec=TYPICAL["canonical"].vispec_section() | changes)


CANONICAL: dict[str, tuple[Spoil, str]] = {
    "no global feature": (_section(global_feature=False), r"does not account for: img_fc\.weight"),
    "no compression": (
        _section(global_feature=False, compress=False),
        "does not account for: img_adaptor",
    ),
    "flag is text": (_section(compress="no"), "compress of the head is 'no', it must be true or"),
    "future format": (_config(vispec={"format_version": 99}), "upgrade vllm-vispec"),
    "flag missing": (_config(vispec={"format_version": 1}), "lacks 'target_model_type'"),
    "queries differ": (
        _section(num_query_tokens=9),
        r"'img_adaptor.query' .* has shape \[3, 4, 8\], config.json asks for \[9, 4, 8\]",
    ),
}

TABLES = {"reference": REFERENCE, "automodel": AUTOMODEL, "canonical": CANONICAL}
CASES = [
    pytest.param(written, spoil, message, id=f"{written}-{name}".replace(" ", "-"))
    for written, table in TABLES.items()
    for name, (spoil, message) in table.items()
]


@pytest.mark.parametrize(("checkpoint_format", "spoil", "message"), CASES)
def test_bad_head(tmp_path: Path, checkpoint_format: str, spoil: Spoil, message: str) -> None:
    write_head(tmp_path, checkpoint_format)
    spoil(tmp_path)
    with pytest.raises(ViSpecError, match=message) as caught:
        inspect_head(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/head", "draft folder '/nowhere/head' does not exist"),
        ("~/no-such-head-here", "does not exist"),
        ("just-a-name", "does not exist: give an existing folder, or a hub id"),
        ("a/b/c", "does not exist"),
        ("", "does not exist"),
        ("model.safetensors", "is a file: give the folder"),
        ("no-such-org/no-such-head", r"could not be fetched from the hub .*download it"),
    ],
)
def test_names_that_lead_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    write_head(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ViSpecError, match=message):
        resolve_head(name, revision="main")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_query_tokens": 0}, "num_query_tokens of the head is 0"),
        ({"vocab_size": True}, "vocab_size of the head is True"),
        ({"head_dim": 7}, "head_dim=7 of the head is odd"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps of the head is 0.0"),
    ],
)
def test_head_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ViSpecError, match=message):
        replace(BASE, **changes)
    with pytest.raises(ViSpecError, match='no "vispec" section'):
        HeadConfig.from_config_json({"model_type": "llama"})
