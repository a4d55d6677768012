"""The draft's own vocabulary: its files, and the setting that names them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.heads import write_head
from vllm_vispec.config import ViSpecConfig
from vllm_vispec.draft_vocab.files import (
    DraftVocab,
    check_lm_head,
    find_vocab,
    read_vocab,
    resolve_draft_vocab,
    write_vocab,
)
from vllm_vispec.heads.export import convert_head
from vllm_vispec.heads.folder import DRAFT_VOCAB, DRAFT_VOCAB_FACTS, inspect_head
from vllm_vispec.utils.errors import ViSpecError

# Files


def test_a_written_list_is_read_back_in_its_order(tmp_path: Path) -> None:
    write_vocab(tmp_path / DRAFT_VOCAB, [9, 2, 30])
    found = read_vocab(tmp_path / DRAFT_VOCAB, 31)
    assert found == DraftVocab((9, 2, 30), by_frequency=True)
    assert found.first(2).token_ids == (9, 2)
    assert [file.name for file in tmp_path.iterdir()] == [DRAFT_VOCAB]


@pytest.mark.parametrize("content", [[4, 1], {"token_ids": [4, 1]}])
def test_json_lists(tmp_path: Path, content: object) -> None:
    (tmp_path / "ids.json").write_text(json.dumps(content))
    assert read_vocab(tmp_path / "ids.json", 8) == DraftVocab((4, 1), by_frequency=False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 8], "token id 8, the target has 0 to 7"),
        ([3], "has 1 token ids, at least 2"),
        ([1, 2, 1], "a token id twice"),
        ([1, True], "holds no list of integers"),
        ({"coverage": 1}, "holds no list of integers"),
    ],
)
def test_lists_that_cannot_be_used_say_why_and_what_to_do(
    tmp_path: Path, content: object, said: str
) -> None:
    (tmp_path / "ids.json").write_text(json.dumps(content))
    with pytest.raises(ViSpecError, match=r"ids\.json") as error:
        read_vocab(tmp_path / "ids.json", 8)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_safetensors_that_hold_something_else(tmp_path: Path) -> None:
    file = tmp_path / "ids.safetensors"
    tensors: list[dict[str, Any]] = [
        {"token_ids": np.zeros((2, 2), np.int32)},
        {"token_ids": np.zeros(4, np.float32)},
        {"a": np.arange(4), "b": np.arange(4)},
    ]
    for content in tensors:
        save_file(content, file)
        with pytest.raises(ViSpecError, match="must hold one tensor, a list of integers"):
            read_vocab(file, 8)
    file.write_bytes(b"nothing")
    with pytest.raises(ViSpecError, match="cannot be read as safetensors"):
        read_vocab(file, 8)


# The setting


def options(value: Any) -> ViSpecConfig:
    return ViSpecConfig.pop_from({"draft_vocab": value})


def test_without_the_setting_nothing_changes(tmp_path: Path) -> None:
    write_vocab(tmp_path / DRAFT_VOCAB, [1, 2])
    for value in (None, False):
        settings: dict[str, Any] = {}
        found = resolve_draft_vocab(options(value), settings, tmp_path, 8)
        assert (found.draft_vocab, settings) == (None, {})
        assert find_vocab(found.draft_vocab, tmp_path, 8) is None


@pytest.mark.parametrize(
    ("value", "ids"), [(True, (5, 1, 7)), ("auto", (5, 1, 7)), (2, (5, 1)), (3, (5, 1, 7))]
)
def test_the_list_of_the_head(tmp_path: Path, value: Any, ids: tuple[int, ...]) -> None:
    write_vocab(tmp_path / DRAFT_VOCAB, [5, 1, 7])
    settings: dict[str, Any] = {}
    found = resolve_draft_vocab(options(value), settings, tmp_path, 8)
    # The way to the workers and back.
    section = json.loads(json.dumps(found.to_section()))
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name} of another machine"))
    config = ViSpecConfig.from_vllm(SimpleNamespace(additional_config=section))
    read = find_vocab(config.draft_vocab, moved, 8)
    assert read is not None
    assert read.token_ids == ids
    assert settings == {"use_local_argmax_reduction": True}


def test_a_list_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's folder may be another one."""
    (tmp_path / "ids.json").write_text("[6, 0]")
    monkeypatch.chdir(tmp_path)
    found = resolve_draft_vocab(options("ids.json"), {}, tmp_path, 8)
    assert found.draft_vocab == str(tmp_path / "ids.json")
    assert find_vocab(found.draft_vocab, tmp_path, 8) == DraftVocab((6, 0))
    # The list of the head comes with the head, wherever that is.
    write_vocab(tmp_path / DRAFT_VOCAB, [5, 1])
    assert resolve_draft_vocab(options(DRAFT_VOCAB), {}, tmp_path, 8).draft_vocab == "auto"


@pytest.mark.parametrize(
    "given",
    [
        {"draft_sample_method": "probabilistic"},
        {"enable_adaptive_verification": True},
        {"use_local_argmax_reduction": False},
    ],
)
def test_what_needs_logits_gets_them(tmp_path: Path, given: dict[str, Any]) -> None:
    write_vocab(tmp_path / DRAFT_VOCAB, [5, 1])
    settings = dict(given)
    resolve_draft_vocab(options(True), settings, tmp_path, 8)
    assert settings == given
    with pytest.raises(ViSpecError, match="leave one of them out"):
        resolve_draft_vocab(options(True), {"draft_lm_head_quantization": "fp8"}, tmp_path, 8)


@pytest.mark.parametrize(
    ("ids", "value", "message"),
    [
        (None, "auto", f"has no {DRAFT_VOCAB}: make one with `vispec vocab"),
        (None, 4, f"has no {DRAFT_VOCAB}"),
        (None, "missing.safetensors", r"draft_vocab='missing\.safetensors' is no file"),
        *(([5, 1, 7], n, f"draft_vocab={n} is outside 2 to 3") for n in (0, 4)),
        *((None, x, "draft_vocab=.* must be a file") for x in (1.5, [1, 2], "")),
    ],
)
def test_settings_that_mean_no_list(
    tmp_path: Path, ids: list[int] | None, value: Any, message: str
) -> None:
    if ids is not None:
        write_vocab(tmp_path / DRAFT_VOCAB, ids)
    with pytest.raises(ViSpecError, match=f"speculative config: .*{message}"):
        resolve_draft_vocab(options(value), {}, tmp_path, 8)


def test_a_number_needs_an_order(tmp_path: Path) -> None:
    save_file({"token_ids": np.arange(4)}, tmp_path / DRAFT_VOCAB)
    with pytest.raises(ViSpecError, match="not ordered by frequency"):
        resolve_draft_vocab(options(3), {}, tmp_path, 8)
    assert find_vocab("auto", tmp_path, 8) == DraftVocab((0, 1, 2, 3))


@pytest.mark.parametrize(
    ("stated", "is_quantized"),
    [
        ({"quant_method": "gptq", "bits": 4, "lm_head": True}, True),
        ({"quant_method": "awq", "bits": 4}, False),
        ({"quant_method": "auto-round", "extra_config": {"lm_head": {"bits": 4}}}, True),
        ({"config_groups": {"group_0": {"targets": ["Linear", "re:.*lm_head"]}}}, True),
        ({"config_groups": {"group_0": {"targets": ["Linear"]}}, "ignore": ["lm_head"]}, False),
        (None, False),
    ],
)
@pytest.mark.parametrize("place", ["hf_config", "hf_text_config"])
def test_a_target_that_says_its_lm_head_is_quantized_is_refused(
    tmp_path: Path, stated: dict[str, Any] | None, is_quantized: bool, place: str
) -> None:
    write_vocab(tmp_path / DRAFT_VOCAB, [5, 1])
    target = SimpleNamespace(hf_config=None, hf_text_config=None)
    setattr(target, place, SimpleNamespace(quantization_config=stated))
    check_lm_head(options(None), target)
    found = resolve_draft_vocab(options(True), {}, tmp_path, 8)
    if not is_quantized:
        check_lm_head(found, target)
        return
    with pytest.raises(ViSpecError, match=r"is quantized \(.*\): leave draft_vocab out"):
        check_lm_head(found, target)


# In a head's folder


@pytest.mark.parametrize("name", ["canonical", "reference"])
def test_a_head_with_a_list_loads_and_converts(tmp_path: Path, name: str) -> None:
    source = tmp_path / "in"
    write_head(source, name)
    # Without an index or the usual name every safetensors file would count as weights.
    (source / "model.safetensors").rename(source / "weights.safetensors")
    write_vocab(source / DRAFT_VOCAB, [5, 1])
    (source / DRAFT_VOCAB_FACTS).write_text("{}")
    assert [file.name for file in inspect_head(source).files] == ["weights.safetensors"]
    for _ in range(2):  # a folder with a list is still one that may be overwritten
        convert_head(source, tmp_path / "out", checkpoint_format=name, overwrite=True)
    assert find_vocab("auto", tmp_path / "out", 8) == DraftVocab((5, 1), by_frequency=True)
    assert (tmp_path / "out" / DRAFT_VOCAB_FACTS).is_file()
