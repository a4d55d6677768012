"""The compressors' benchmark: arms, costs, tables and picture, without engines or training."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.answers import IMAGES, Asked
from benchmarks.compressors.findings import (
    IMAGE_TOKENS,
    best_known,
    choose_by_family,
    count_parameters,
    image_cost,
    load_compressor,
    primitive_flops,
    read_findings,
)
from benchmarks.compressors.page import draw, to_markdown
from benchmarks.compressors.variants import (
    REFERENCE,
    SCALING,
    SWEEPS,
    TABLE_3,
    TABLE_4,
    TABLE_7,
    VARIANTS,
)
from benchmarks.study import EPOCHS, RECIPE, Study, Trained, Variant, Workspace
from examples.tiny_vlm.families import FAMILIES
from vllm_vispec.compressors.spec import COMBINATIONS, PRIMITIVES, parse_compressor
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.reference import ViSpecDraft
from vllm_vispec.train.config import load_config
from vllm_vispec.train.head_types import compressor_of, get_head_type, new_head_config

WIDTH = 32


class TextConfig:
    """What `new_head_config` reads of a target."""

    hidden_size, intermediate_size, num_attention_heads = WIDTH, 48, 4
    vocab_size, max_position_embeddings, rms_norm_eps = 64, 256, 1e-6
    rope_parameters = {"rope_theta": 10_000.0}  # noqa: RUF012


def config_of(arm: Variant) -> HeadConfig:
    settings = arm.settings
    return new_head_config(
        settings["head.kind"], TextConfig, compressor=settings.get("head.compressor", "")
    )


def asked(accepted: int) -> list[Asked]:
    return [Asked(name, (accepted,) * 2, 2 * accepted + 2, True, 4.0, 2.0) for name in FAMILIES]


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_cell(workspace: Workspace, name: str, epochs: int, accepted: int) -> Trained:
    """A head with results of the engine."""
    cell = Trained(VARIANTS[name], epochs, 0)
    config, folder = config_of(cell.variant), workspace.head(cell)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(ViSpecDraft(config).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_config_json("float32")))
    write_json(workspace.result("cells", cell), [asdict(one) for one in asked(accepted)])
    return cell


@pytest.fixture
def measured(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path)
    for epochs in (1, EPOCHS):
        write_cell(workspace, REFERENCE, epochs, epochs)
    write_cell(workspace, "prune_20", EPOCHS, 3)
    select = write_cell(workspace, "select", EPOCHS, 4)
    branches = tuple(COMBINATIONS["select"].default.split(","))
    for name, accepted in ((REFERENCE, 1), ("select", 2)):
        rounds = [{"family": family, "accepted": [accepted, accepted]} for family in FAMILIES]
        write_json(workspace.result("replayed", Trained(VARIANTS[name], EPOCHS, 0)), rounds)
    gates = {"charts": ([3, 0, 1, 0, 0], [0.4, 0.1, 0.3, 0.1, 0.1])}
    gates["captioning"] = ([0, 0, 12, 0, 0], [0.0, 0.0, 1.0, 0.0, 0.0])
    found = [
        {"family": family, "branches": branches, "counts": counts, "shares": shares}
        for family, (counts, shares) in gates.items()
    ]
    write_json(workspace.result("choices", select), found)
    fields = {"seconds": 0.006, "reference_seconds": 0.012, "ratio": 0.5, "low": 0.4, "high": 0.6}
    write_json(
        workspace.result("prefill", select), [{"image_tokens": n, **fields} for n in IMAGE_TOKENS]
    )
    return workspace


def study_of(workspace: Workspace) -> Study:
    return Study(workspace, "target", tuple(VARIANTS.values()), (0,), 32, 7, 4, 1, 1)


def findings_of(workspace: Workspace) -> list[dict[str, Any]]:
    return read_findings(study_of(workspace))


def tables_of(workspace: Workspace) -> str:
    return to_markdown({"rows": findings_of(workspace)})


@pytest.mark.parametrize("arm", VARIANTS.values(), ids=list(VARIANTS))
def test_recipe_of_every_arm_is_valid(arm: Variant, tmp_path: Path) -> None:
    settings = study_of(Workspace(tmp_path)).recipe(arm, 1) | {"schedule.epochs": "2"}
    config = load_config(Path(RECIPE), [f"{name}={value}" for name, value in settings.items()])
    config.require_complete()
    kind = get_head_type(config.head.kind)
    assert not kind.text_only
    if kind.compress:
        made_by = compressor_of(config.head.kind, config.head.compressor)
        assert made_by == str(parse_compressor(arm.settings.get("head.compressor", "query")))
    assert (config.loss.name, config.loss.passes) == ("specvlm", 1)
    # Every run warms up in as many steps, however many epochs its first stage has.
    assert config.schedule.warmup * arm.epochs[0] == pytest.approx(0.05)


def test_arms_differ_in_the_head_only() -> None:
    def rest(arm: Variant) -> dict[str, str]:
        return {
            k: v for k, v in arm.settings.items() if k.split(".")[0] not in ("head", "schedule")
        }

    reference = VARIANTS[REFERENCE]
    for arm in VARIANTS.values():
        assert (arm.data, arm.answers, rest(arm)) == ("mixed", "target", rest(reference))
        assert EPOCHS in arm.epochs
        assert arm.after == ("" if arm is reference else REFERENCE)


def test_every_number_of_the_paper_has_an_arm() -> None:
    assert set(TABLE_3) <= set(VARIANTS)
    assert {name: tuple(found) for name, found in TABLE_4.items()} == dict(SWEEPS)
    assert {f"{name}_{n}" for name, numbers in SWEEPS.items() for n in numbers} <= set(VARIANTS)
    for name, found in TABLE_7.items():
        assert VARIANTS[name].epochs == tuple(found) == SCALING


@pytest.mark.parametrize("size", [1, *IMAGE_TOKENS])
def test_kv_tokens(size: int) -> None:
    def cost(name: str) -> tuple[int, tuple[int, int]]:
        found = image_cost(config_of(VARIANTS[name]), size)
        return found["kv_tokens"], tuple(found["seen"])

    assert cost(REFERENCE) == (size, (size, size))
    assert cost("adaptor") == cost("adaptor_global") == (1, (1, 1))
    assert cost("text_only") == (0, (0, 0))
    twentieth = max(1, size // 20)
    assert cost("prune_20") == (twentieth, (twentieth, twentieth))
    if size > 1:
        third = size // 3
        kept = 2 * twentieth + third + 2
        assert cost("concat") == (kept, (kept, kept))
        assert cost("select") == (kept, (0, third))
        assert cost("weighted") == (3 * third, (3 * third, 3 * third))


def test_flops_grow_with_what_is_computed() -> None:
    def megaflops(name: str) -> float:
        return float(image_cost(config_of(VARIANTS[name]), 1024)["megaflops"])

    assert megaflops("text_only") == 0.0
    rows = 51 * (2 * WIDTH**2 + 4 * WIDTH**2)
    assert megaflops("prune_20") == pytest.approx(rows / 1e6)
    assert megaflops("pool_20") == pytest.approx((rows + 1024 * WIDTH) / 1e6)
    assert megaflops(REFERENCE) == pytest.approx(1024 * 8 * WIDTH**2 / 1e6)
    assert megaflops("select_global") > megaflops("select") > megaflops("conv_3")


def test_parameters() -> None:
    def image_part(name: str) -> int:
        return count_parameters(config_of(VARIANTS[name]))[1]

    square = WIDTH**2
    assert image_part(REFERENCE) == image_part("prune_20") == 0
    assert image_part("conv_3") == 3 * square + WIDTH
    attention = 3 * square + 2 * WIDTH
    assert image_part("resampler_2") == attention + 2 * WIDTH
    gate = square // 4 + WIDTH // 4 + 5 * WIDTH // 4 + 5
    assert image_part("select") == image_part("conv_3") + image_part("resampler_2") + gate
    img_fc, one_query = 2 * square + WIDTH, attention + WIDTH
    assert image_part("select_global") == image_part("select") + img_fc + one_query
    total, _ = count_parameters(config_of(VARIANTS[REFERENCE]))
    assert total == sum(p.numel() for p in ViSpecDraft(config_of(VARIANTS[REFERENCE])).parameters())


def test_gate_is_read_from_the_head(measured: Workspace) -> None:
    compressor = load_compressor(measured.head(Trained(VARIANTS["select"], EPOCHS, 0)))
    asked_GD = [("charts", torch.zeros(WIDTH)), ("reasoning", torch.ones(WIDTH))] * 2
    found = choose_by_family(compressor, asked_GD)
    assert [one["family"] for one in found] == ["charts", "reasoning"]
    for one, state_D in zip(found, (torch.zeros(WIDTH), torch.ones(WIDTH)), strict=True):
        output = compressor.decide(state_D[None])
        assert one["counts"][int(output.choice_G)] == sum(one["counts"]) == 2
        assert one["shares"] == pytest.approx(output.share_GK[0].tolist())


def test_findings(measured: Workspace) -> None:
    found = findings_of(measured)
    names = [f"{name}-e{EPOCHS}-s0" for name in ("eagle_vlm", "select", "prune_20")]
    assert [one["name"] for one in found] == ["eagle_vlm-e1-s0", *names]
    before, reference, select, prune = found
    assert select["engine"]["acceptance_length_ratio"]["mean"] == pytest.approx(5 / 3)
    assert best_known(select) == select["replayed"]
    assert (select["replayed"]["mean"], select["replayed_ratio"]["mean"]) == (3.0, 1.5)
    assert reference["replayed_ratio"] is before["replayed"] is prune["replayed_ratio"] is None
    assert best_known(prune) == prune["engine"]["acceptance_length"][IMAGES]
    assert prune["engine"]["acceptance_length"][IMAGES]["mean"] == 4.0
    content = json.loads(json.dumps(found))[2]
    assert content["engine"]["acceptance_length"][IMAGES]["mean"] == 5.0
    assert [one["image_tokens"] for one in content["image_cost"]] == list(IMAGE_TOKENS)
    assert content["draft_prefill"][0]["ratio"] == 0.5
    assert content["choices"][0]["counts"] == [3, 0, 1, 0, 0]


def test_tables(measured: Workspace) -> None:
    tables = tables_of(measured)
    replayed = "3.00 (3.00-3.00) | 1.50 (1.50-1.50)"
    engine = "5.00 (5.00-5.00) | 1.67 (1.67-1.67) | 2.00 (2.00-2.00) | 7/7"
    assert f"| select | {replayed} | {engine} | 2.03/3.69 |" in tables
    assert "| prune, 20x |  |  | 4.00 (4.00-4.00) |" in tables
    assert "| 1 | 2.00/2.00 |  | 1.91/3.29 | 2.03/3.40 |" in tables
    ours = "2.00 (2.00-2.00), 2.00/3.00 | 3.00 (3.00-3.00), 2.00/5.00"
    assert f"| {EPOCHS} | {ours} | 1.99/4.26 | 2.03/4.32 |" in tables
    assert "29, seen 0 to 21" in tables
    assert "| select | 6.0 | 6.0 | 6.0 | 0.50 (0.40-0.60) |" in tables
    assert "| select, epoch 2 | 16 | prune:20: 3 (0.10), pool:20: 0 (0.03)" in tables


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert tables_of(workspace) == ""
    cell = write_cell(workspace, "prune_20", EPOCHS, 3)
    tables = tables_of(workspace)
    assert "| prune, 20x |" in tables
    assert "| EagleVLM |" not in tables
    assert "measured" not in tables
    assert "Epochs" not in tables
    workspace.result("cells", cell).unlink()
    assert findings_of(workspace) == []


def test_replay_alone_makes_a_row(measured: Workspace) -> None:
    measured.result("cells", Trained(VARIANTS["select"], EPOCHS, 0)).unlink()
    tables = tables_of(measured)
    assert "| select | 3.00 (3.00-3.00) | 1.50 (1.50-1.50) |  |  |  |  | 2.03/3.69 |" in tables


def test_wrong_answers_show(measured: Workspace) -> None:
    first, *others = asked(4)
    cell = Trained(VARIANTS["select"], EPOCHS, 0)
    wrong = [replace(first, identical=False), *others]
    write_json(measured.result("cells", cell), [asdict(one) for one in wrong])
    assert "| 6/7 | 2.03/3.69 |" in tables_of(measured)


def test_plot(measured: Workspace, tmp_path: Path) -> None:
    file = tmp_path / "plot.png"
    draw({"rows": findings_of(measured)}, file)
    first = file.read_bytes()
    assert first.startswith(b"\x89PNG")
    draw({"rows": findings_of(measured)}, file)
    assert file.read_bytes() == first
    draw({"rows": []}, file)
    assert file.read_bytes() != first


def test_registry_defaults_are_arms() -> None:
    for name in SWEEPS:
        assert f"{name}_{PRIMITIVES[name].default}" in VARIANTS


def test_cost_of_primitives() -> None:
    width, size = 16, 40
    flops = {
        "prune:20": 0,
        "pool:20": size * width,
        "conv:3": 13 * 6 * width**2,
        "text_only": 0,
        # Keys and values of all embeddings, scores and sums of two queries, the output projection.
        "resampler:2": 2 * (2 * size * width**2) + 2 * (2 * 2 * size * width) + 2 * 2 * width**2,
    }
    found = {text: primitive_flops(parse_compressor(text), width, size) for text in flops}
    assert found == flops
