"""Exported and converted heads, and how a head finds its target."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from tests.heads.test_checkpoint_formats import same_weights
from tests.heads.test_head_kinds import KINDS
from tests.support.heads import TYPICAL, write_head
from vllm_vispec.cli.app import app
from vllm_vispec.cli.doctor import head_lines
from vllm_vispec.heads.export import Export, convert_head, export_head
from vllm_vispec.heads.folder import inspect_head, iter_canonical_tensors
from vllm_vispec.heads.speculators import locate_target, read_serving
from vllm_vispec.reference import ViSpecDraft
from vllm_vispec.utils.errors import ViSpecError

PROVENANCE = {"command": "vispec train a|b", "data": {"files": ["x.jsonl"], "digest": "abc"}}


def make_target(folder: Path) -> Path:
    folder.mkdir(parents=True)
    config = {"architectures": ["SomeVLM"], "model_type": "qwen2_5_vl"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def export(folder: Path, target: str, **changes: Any) -> Path:
    flags = {k: changes.pop(k) for k in ("compress", "global_feature") if k in changes}
    draft = ViSpecDraft(replace(TYPICAL["canonical"], **flags))
    export_head(draft, replace(Export(folder, target, "float32", 3, PROVENANCE), **changes))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


@pytest.mark.parametrize(("compress", "global_feature"), KINDS)
def test_export_is_a_canonical_head(tmp_path: Path, compress: bool, global_feature: bool) -> None:
    head = replace(TYPICAL["canonical"], compress=compress, global_feature=global_feature)
    draft = ViSpecDraft(head)
    to = Export(tmp_path / "new" / "head", "org/target", "bfloat16", 5, PROVENANCE)
    info = export_head(draft, to)
    assert info.checkpoint_format == "canonical"
    assert info.config == head
    found = dict(iter_canonical_tensors(info))
    assert found.keys() == draft.state_dict().keys()
    for name, tensor in draft.state_dict().items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name
    names = {path.name for path in info.folder.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "provenance.json"}
    assert [path.name for path in info.folder.parent.iterdir()] == ["head"]
    assert json.loads((info.folder / "provenance.json").read_text()) == PROVENANCE


def test_config_and_card_name_the_target(tmp_path: Path) -> None:
    target, head = make_target(tmp_path / "target"), tmp_path / "head"
    content = config_of(export(head, str(target)))
    assert f"serve with     vllm serve {head} (target: {target})" in head_lines(str(head))
    assert content["speculators_model_type"] == "vispec"
    section = content["speculators_config"]
    assert section["verifier"] == {"name_or_path": str(target), "architectures": ["SomeVLM"]}
    assert section["proposal_methods"][0]["speculative_tokens"] == 3
    layer = content["transformer_layer_config"]
    assert (layer["model_type"], layer["num_hidden_layers"]) == ("llama", 1)
    lines = [line.strip() for line in (head / "README.md").read_text().splitlines()]
    explicit = f'"method":"vispec","model":"{head}","num_speculative_tokens":3'
    assert {
        f"vllm serve {head}",
        f"vllm serve {target} --speculative-config '{{{explicit}}}'",
        "| command | vispec train a\\|b |",
        "| data.digest | abc |",
    } <= set(lines)


def test_relative_target_moves_with_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_target(tmp_path / "pair" / "target")
    monkeypatch.chdir(tmp_path)
    head = export(Path("pair/heads/one"), "pair/target")
    serving = read_serving(config_of(head))
    assert serving is not None
    assert serving.target == "../../target"
    assert locate_target(serving.target, head) == str(tmp_path / "pair" / "target")
    shutil.move("pair", "elsewhere")
    moved = Path("elsewhere/heads/one")
    assert locate_target(serving.target, moved) == str(tmp_path / "elsewhere" / "target")


def test_targets_that_cannot_be_found(tmp_path: Path) -> None:
    with pytest.raises(ViSpecError, match=r"target '\./none' is no folder"):
        export(tmp_path / "head", "./none")
    assert not (tmp_path / "head").exists()
    with pytest.raises(ViSpecError, match=r"the target of head .*head is '\.\./gone'"):
        locate_target("../gone", tmp_path / "head")
    assert locate_target("org/name", tmp_path) == "org/name"
    content = config_of(export(tmp_path / "head", "org/target"))
    assert read_serving({"speculators_model_type": "eagle3"}) is None
    del content["speculators_config"]["proposal_methods"]
    with pytest.raises(ViSpecError, match="incomplete speculators_config"):
        read_serving(content)


def test_export_refuses_a_folder_that_exists(tmp_path: Path) -> None:
    export(tmp_path / "head", "org/target")
    with pytest.raises(ViSpecError, match="exists: choose another"):
        export(tmp_path / "head", "org/target")
    export(tmp_path / "head", "org/other", overwrite=True)
    assert "org/other" in (tmp_path / "head" / "config.json").read_text()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_file(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    with pytest.raises(ViSpecError, match=r"cannot be written .*No space left.*free space"):
        export(tmp_path / "head", "org/target")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(TYPICAL))
def test_convert_to_canonical(tmp_path: Path, name: str) -> None:
    head = write_head(tmp_path / "source", name)
    info = convert_head(tmp_path / "source", tmp_path / "out" / "head")
    assert (info.checkpoint_format, info.config) == ("canonical", head)
    assert info == inspect_head(tmp_path / "out" / "head")
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
    assert f"converted from the {name} format" in card


@pytest.mark.parametrize("name", ["reference", "automodel"])
def test_round_trip_with_published_formats(tmp_path: Path, name: str) -> None:
    """Theirs, ours and theirs again: the same head and the same numbers at every stage."""
    head = write_head(tmp_path / "theirs", name)
    convert_head(tmp_path / "theirs", tmp_path / "ours")
    for _ in range(2):  # what was written may be overwritten
        info = convert_head(
            tmp_path / "ours", tmp_path / "back", checkpoint_format=name, overwrite=True
        )
    assert (info.checkpoint_format, info.config) == (name, head)
    first = inspect_head(tmp_path / "theirs")
    assert {name for name, _ in info.sources.values()} == {
        name for name, _ in first.sources.values()
    }
    same_weights(tmp_path / "back", head)
    assert "vispec" not in config_of(tmp_path / "back")


def test_convert_to_bfloat16_without_embeddings(tmp_path: Path) -> None:
    write_head(tmp_path / "source", "reference")
    out = tmp_path / "out"
    info = convert_head(tmp_path / "source", out, dtype="bfloat16", drop_embed_tokens=True)
    assert info.dtype == "BF16"
    assert not info.config.has_embed_tokens
    assert config_of(out)["dtype"] == "bfloat16"
    assert {t.dtype for _, t in iter_canonical_tensors(inspect_head(out))} == {torch.bfloat16}


def test_convert_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    write_head(tmp_path / "source")
    with pytest.raises(ViSpecError, match="--dtype 'int8' is not supported"):
        convert_head(tmp_path / "source", tmp_path / "out", dtype="int8")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    out, foreign = tmp_path / "out", tmp_path / "foreign"
    convert_head(tmp_path / "source", out)
    with pytest.raises(ViSpecError, match="exists: choose another or add --overwrite"):
        convert_head(tmp_path / "source", out)
    convert_head(tmp_path / "source", out, overwrite=True)
    with pytest.raises(ViSpecError, match="is the source"):
        convert_head(out, out, overwrite=True)
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(ViSpecError, match="would delete its files"):
        convert_head(tmp_path / "source", foreign, overwrite=True)
    assert (foreign / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("reference", {"compress": False}, "cannot express .*compress=False"),
        ("automodel", {"global_feature": False}, "cannot express .*global_feature=False"),
        ("reference", {"final_norm": True}, "cannot express final_norm=True"),
        ("automodel", {"target_model_type": "odd_text"}, "target_model_type='odd_text'"),
    ],
)
def test_kinds_a_published_format_cannot_express(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    write_head(tmp_path / "ours", "canonical", **changes)
    with pytest.raises(ViSpecError, match=message):
        convert_head(tmp_path / "ours", tmp_path / "theirs", checkpoint_format=name)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_converting_keeps_target_and_provenance(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target")
    head = export(tmp_path / "head", str(target), compress=False)
    out = convert_head(head, tmp_path / "half", dtype="float16").folder
    serving = read_serving(config_of(out))
    assert serving is not None
    assert (serving.target, serving.num_tokens) == (str(target), 3)
    assert json.loads((out / "provenance.json").read_text()) == PROVENANCE
    named = convert_head(head, tmp_path / "named", target="org/other").folder
    other = read_serving(config_of(named))
    assert other is not None
    assert other.target == "org/other"


def test_convert_command_writes_a_published_format(tmp_path: Path) -> None:
    write_head(tmp_path / "in")

    def run(*options: str) -> Result:
        return CliRunner().invoke(
            app, ["convert", str(tmp_path / "in"), str(tmp_path / "out"), *options]
        )

    result = run("--format", "reference")
    assert result.exit_code == 0, result.output
    assert inspect_head(tmp_path / "out").checkpoint_format == "reference"
    bad, old = run("--format", "nonsense", "--overwrite"), run("--dialect", "reference")
    assert bad.exit_code == old.exit_code == 1
    assert "unknown checkpoint format 'nonsense'" in bad.stderr
    assert "--dialect is now --format: use --format reference" in old.stderr
