"""Heads with a compressor on disk: written, read back, refused, and named to the user."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.heads import edit_config, write_head
from tests.train.samples import COMPRESSORS, random_draft
from vllm_vispec.cli.doctor import head_lines
from vllm_vispec.compressors.spec import parse_compressor
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.export import Export, convert_head, export_head
from vllm_vispec.heads.folder import inspect_head, load_draft
from vllm_vispec.reference import ViSpecDraft
from vllm_vispec.utils.errors import ViSpecError

EACH_COMPRESSOR = pytest.mark.parametrize("name", COMPRESSORS)


def exported(folder: Path, name: str) -> ViSpecDraft:
    draft = random_draft(COMPRESSORS[name])
    export_head(draft, Export(folder, "org/target", "float32", 4, {}))
    return draft


def written(folder: Path, compressor: str, **changes: object) -> HeadConfig:
    return write_head(folder, "canonical", compressor=compressor, num_query_tokens=1, **changes)


@EACH_COMPRESSOR
def test_an_exported_head_is_read_back_and_converted(tmp_path: Path, name: str) -> None:
    draft = exported(tmp_path / "head", name)
    info = inspect_head(tmp_path / "head")
    assert info.config.compressor_spec == draft.config.compressor_spec
    assert replace(info.config, compressor=draft.config.compressor) == draft.config
    again = load_draft(tmp_path / "head")
    assert again.state_dict().keys() == draft.state_dict().keys() == info.shapes.keys()
    for key, tensor in draft.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    image = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.image_tokens([image])[0], draft.image_tokens([image])[0])
    spec = COMPRESSORS[name].compressor_spec
    info = convert_head(tmp_path / "head", tmp_path / "copy", dtype="bfloat16")
    assert (info.config.compressor, info.dtype) == (str(spec), "BF16")
    assert f"| compressor | {spec} |" in (tmp_path / "copy" / "README.md").read_text()
    section = json.loads((tmp_path / "copy" / "config.json").read_text())["vispec"]
    assert (section["compressor"], section["format_version"]) == (str(spec), 2)
    shown = head_lines(str(tmp_path / "copy"))
    assert f"compressor     {spec}" in shown
    assert "None" not in "".join(shown)


@pytest.mark.parametrize("name", ["reference", "automodel"])
def test_published_formats_do_not_know_compressors(tmp_path: Path, name: str) -> None:
    exported(tmp_path / "head", "pool")
    with pytest.raises(ViSpecError, match=r"cannot express .*compressor='pool:2'"):
        convert_head(tmp_path / "head", tmp_path / "copy", checkpoint_format=name)


def test_tensors_of_another_compressor_are_named(tmp_path: Path) -> None:
    written(tmp_path, "conv:3")
    section = json.loads((tmp_path / "config.json").read_text())["vispec"]
    for compressor, message in (
        ("conv:4", r"'compressor\.branches\.0\.kernel\.weight'.*\[32, 96\]"),
        ("resampler:3", r"lacks 6 tensor.*compressor\.branches\.0\.attention"),
        ("prune:3", r"does not account for: compressor\.branches\.0\.kernel"),
        ("jpeg:2", "'jpeg:2' cannot be used: use one of query"),
        (7, "it must be a text"),
    ):
        edit_config(tmp_path, vispec=section | {"compressor": compressor})
        with pytest.raises(ViSpecError, match=message):
            inspect_head(tmp_path)


def test_flags_that_do_not_go_with_a_compressor() -> None:
    head = COMPRESSORS["prune"]
    with pytest.raises(ViSpecError, match="needs compress = true"):
        replace(head, compress=False)
    with pytest.raises(ViSpecError, match="num_query_tokens=3 does not go with"):
        replace(head, num_query_tokens=3)


def test_heads_of_the_adaptor_stay_version_one(tmp_path: Path) -> None:
    write_head(tmp_path, "canonical")
    section = json.loads((tmp_path / "config.json").read_text())["vispec"]
    assert section["format_version"] == 1
    assert "compressor" not in section
    assert parse_compressor(inspect_head(tmp_path).config.compressor).is_query
