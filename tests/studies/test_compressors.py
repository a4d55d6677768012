"""The compressors' study: variants, replay, costs, tables and picture, without engines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.answers import IMAGES
from benchmarks.calls import Call
from benchmarks.compressors import REFERENCE, VARIANTS, findings
from benchmarks.compressors.findings import (
    IMAGE_TOKENS,
    choose_by_family,
    count_image_parameters,
    image_cost,
    primitive_flops,
    question_states,
    read_findings,
    replay_all,
)
from benchmarks.compressors.page import best_known, draw, to_markdown
from benchmarks.study import EPOCHS, RECIPE, Study, Trained, Variant
from examples.tiny_vlm.families import FAMILIES
from tests.studies.made_up import make_study, one_of_each, write_calls
from vllm_vispec.compressors.spec import COMBINATIONS, parse_compressor
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.reference import ViSpecDraft
from vllm_vispec.train.config import load_config
from vllm_vispec.train.head_types import compressor_of, get_head_type
from vllm_vispec.train.init import new_head_config
from vllm_vispec.train.target import Observed, Runs
from vllm_vispec.utils.files import write_json

WIDTH, VOCAB = 32, 64


class TextConfig:
    """What `new_head_config` reads of a target."""

    hidden_size, intermediate_size, num_attention_heads = WIDTH, 48, 4
    vocab_size, max_position_embeddings, rms_norm_eps = VOCAB, 256, 1e-6
    rope_parameters = {"rope_theta": 10_000.0}  # noqa: RUF012


def config_of(name: str) -> HeadConfig:
    variant = VARIANTS[name]
    compressor = variant.more.get("head.compressor", "")
    return new_head_config(variant.kind, TextConfig, compressor=compressor)


def write_cell(study: Study, name: str, epochs: int, calls: list[Call]) -> Trained:
    """A head with results of the engine."""
    cell = Trained(VARIANTS[name], epochs, 0)
    config, folder = config_of(name), study.head(cell)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(ViSpecDraft(config).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_config_json("float32")))
    write_calls(study, "cells", cell.variant, epochs, 0, calls)
    return cell


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path, [*VARIANTS.values()])


@pytest.fixture
def measured(study: Study) -> Study:
    """Of two heads there is a replay, too; one answer of the second is wrong."""
    for epochs in (1, EPOCHS):
        write_cell(study, REFERENCE, epochs, one_of_each(epochs))
    write_cell(study, "prune_20", EPOCHS, one_of_each(3))
    first, *others = one_of_each(4)
    select = write_cell(study, "select", EPOCHS, [replace(first, identical=(False,)), *others])
    for name, accepted in ((REFERENCE, 1), ("select", 2)):
        calls = [Call((family,), ((accepted, accepted),)) for family in FAMILIES]
        write_calls(study, "replayed", VARIANTS[name], EPOCHS, 0, calls)
    branches = COMBINATIONS["select"].default.split(",")
    gates = {"charts": ([3, 0, 1, 0, 0], [0.4, 0.1, 0.3, 0.1, 0.1])}
    gates["captioning"] = ([0, 0, 12, 0, 0], [0.0, 0.0, 1.0, 0.0, 0.0])
    found = [
        {"family": family, "branches": branches, "counts": counts, "shares": shares}
        for family, (counts, shares) in gates.items()
    ]
    write_json(study.result("choices", select), found)
    return study


def tables_of(study: Study) -> str:
    return to_markdown({"rows": read_findings(study)})


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_variants_differ_in_a_valid_head_only(variant: Variant, study: Study) -> None:
    settings = study.recipe(variant, 1) | {"schedule.epochs": "2"}
    config = load_config(Path(RECIPE), [f"{name}={value}" for name, value in settings.items()])
    config.require_complete()
    kind = get_head_type(config.head.kind)
    assert not kind.text_only
    if kind.compress:
        made_by = compressor_of(config.head.kind, config.head.compressor)
        assert made_by == str(parse_compressor(variant.more.get("head.compressor", "query")))
    assert (config.loss.name, config.loss.passes) == ("specvlm", 1)
    # Every run warms up in as many steps, however many epochs its first stage has.
    assert config.schedule.warmup * variant.epochs[0] == pytest.approx(0.05)

    def rest(one: Variant) -> dict[str, str]:
        return {k: v for k, v in one.more.items() if k.split(".")[0] not in ("head", "schedule")}

    reference = VARIANTS[REFERENCE]
    assert (variant.data, variant.answers) == ("mixed", "target")
    assert rest(variant) == rest(reference)
    assert EPOCHS in variant.epochs
    assert variant.after == ("" if variant is reference else REFERENCE)


# What a head costs


@pytest.mark.parametrize("size", [1, *IMAGE_TOKENS])
def test_kv_tokens(size: int) -> None:
    def cost(name: str) -> tuple[int, tuple[int, int]]:
        found = image_cost(config_of(name), size)
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
        return float(image_cost(config_of(name), 1024)["megaflops"])

    assert megaflops("text_only") == 0.0
    rows = 51 * (2 * WIDTH**2 + 4 * WIDTH**2)
    assert megaflops("prune_20") == pytest.approx(rows / 1e6)
    assert megaflops("pool_20") == pytest.approx((rows + 1024 * WIDTH) / 1e6)
    assert megaflops(REFERENCE) == pytest.approx(1024 * 8 * WIDTH**2 / 1e6)
    assert megaflops("select_global") > megaflops("select") > megaflops("conv_3")
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


def test_parameters() -> None:
    def count(name: str) -> int:
        return count_image_parameters(config_of(name))

    square = WIDTH**2
    assert count(REFERENCE) == count("prune_20") == 0
    assert count("conv_3") == 3 * square + WIDTH
    attention = 3 * square + 2 * WIDTH
    assert count("resampler_2") == attention + 2 * WIDTH
    gate = square // 4 + WIDTH // 4 + 5 * WIDTH // 4 + 5
    assert count("select") == count("conv_3") + count("resampler_2") + gate
    img_fc, one_query = 2 * square + WIDTH, attention + WIDTH
    assert count("select_global") == count("select") + img_fc + one_query


# Replay and gates


def observed(name: str, runs: Runs, answers: tuple[tuple[int, int], ...], length: int) -> Observed:
    generator = torch.Generator().manual_seed(length)
    answer = torch.zeros(length, dtype=torch.bool)
    for start, end in answers:
        answer[start:end] = True
    return Observed(
        name,
        "charts",
        torch.randint(VOCAB, (length,), generator=generator),
        answer,
        runs,
        torch.randn(length, WIDTH, generator=generator),
        torch.randn(length, WIDTH, generator=generator),
    )


def test_gates_are_asked_behind_an_image_only() -> None:
    one = observed("one", ((4, 9),), ((2, 4), (12, 15), (20, 22)), 24)
    text = observed("text", (), ((3, 6),), 8)
    states = [state for _, state in question_states([one, text])]
    assert torch.equal(torch.stack(states), one.hidden_LD[[11, 19]])


def test_replay_of_a_batch_is_that_of_each_sample() -> None:
    torch.manual_seed(0)
    draft = ViSpecDraft(config_of("select")).eval()
    samples = [
        observed("a", ((4, 30),), ((33, 45),), 46),
        observed("b", (), ((3, 9),), 10),
        observed("c", ((1, 3), (5, 25)), ((27, 30), (33, 40)), 41),
    ]
    target: Any = SimpleNamespace(lm_head_VD=torch.randn(VOCAB, WIDTH))
    together = list(replay_all(draft, target, samples))
    assert together == [one for sample in samples for one in replay_all(draft, target, [sample])]
    # Every answer token but the first of each answer comes out of a step.
    for found, tokens in zip(together, (11, 5, 2 + 6), strict=True):
        (accepted,) = found.accepted
        assert sum(accepted) + len(accepted) == tokens


def test_a_gate_chooses_by_family() -> None:
    torch.manual_seed(0)
    compressor = ViSpecDraft(config_of("select")).eval().compressor
    assert compressor is not None
    asked_GD = [("charts", torch.zeros(WIDTH)), ("reasoning", torch.ones(WIDTH))] * 2
    found = choose_by_family(compressor, asked_GD)
    assert [one["family"] for one in found] == ["charts", "reasoning"]
    for one, state_D in zip(found, (torch.zeros(WIDTH), torch.ones(WIDTH)), strict=True):
        output = compressor.decide(state_D[None])
        assert one["counts"][int(output.choice_G)] == sum(one["counts"]) == 2
        assert one["shares"] == pytest.approx(output.share_GK[0].tolist())


def test_nothing_is_computed_twice(measured: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    one = replace(measured, variants=(VARIANTS["select"],))
    monkeypatch.setattr(findings, "observe", lambda *_: 1 / 0)
    findings.look_at_held_out(one)


# The page


def test_findings(measured: Study) -> None:
    found = read_findings(measured)
    names = [f"{name}-e{EPOCHS}-s0" for name in ("eagle_vlm", "select", "prune_20")]
    assert [one["name"] for one in found] == ["eagle_vlm-e1-s0", *names]
    _, reference, select, prune = json.loads(json.dumps(found))
    assert select["engine"]["acceptance_length_ratio"]["mean"] == pytest.approx(5 / 3)
    assert (select["replayed"]["mean"], select["replayed_ratio"]["mean"]) == (3.0, 1.5)
    assert reference["replayed_ratio"] is prune["replayed"] is None
    assert best_known(select) == select["replayed"]
    assert best_known(prune) == prune["engine"]["acceptance_length"][IMAGES]


def test_tables(measured: Study) -> None:
    tables = tables_of(measured)
    replayed = "3.00 (3.00-3.00) | 1.50 (1.50-1.50)"
    engine = "5.00 (5.00-5.00) | 1.67 (1.67-1.67) | 2.00 (2.00-2.00) | 6/7"
    assert f"| select | {replayed} | {engine} | 2.03/3.69 |" in tables
    assert "| prune, 20x |  |  | 4.00 (4.00-4.00) |" in tables
    assert "| 1 | 2.00/2.00 |  | 1.91/3.29 | 2.03/3.40 |" in tables
    ours = "2.00 (2.00-2.00), 2.00/3.00 | 3.00 (3.00-3.00), 2.00/5.00"
    assert f"| {EPOCHS} | {ours} | 1.99/4.26 | 2.03/4.32 |" in tables
    assert "29, seen 0 to 21" in tables
    assert "| select, epoch 2 | 16 | prune:20: 3 (0.10), pool:20: 0 (0.03)" in tables
    # A replay alone makes a row.
    measured.result("cells", Trained(VARIANTS["select"], EPOCHS, 0)).unlink()
    assert f"| select | {replayed} |  |  |  |  | 2.03/3.69 |" in tables_of(measured)


def test_what_was_not_measured_is_left_out(study: Study) -> None:
    assert tables_of(study) == ""
    cell = write_cell(study, "prune_20", EPOCHS, one_of_each(3))
    tables = tables_of(study)
    assert "| prune, 20x |" in tables
    assert "| EagleVLM |" not in tables
    assert "Epochs" not in tables
    study.result("cells", cell).unlink()
    assert read_findings(study) == []


def test_plot(measured: Study, tmp_path: Path) -> None:
    file = tmp_path / "plot.png"
    draw({"rows": read_findings(measured)}, file)
    assert file.read_bytes().startswith(b"\x89PNG")
    draw({"rows": []}, file)
