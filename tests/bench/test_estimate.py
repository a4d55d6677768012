"""The cost model: its limits, numbers worked out by hand, what users give."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.bench.pairs_to_estimate import (
    CHECKPOINTS,
    DRAFT,
    HARDWARE,
    PERFECT,
    QWEN_7B,
    TARGET,
    TYPICAL,
    folder,
    options,
    speedup,
)
from vllm_vispec.bench.estimate import (
    DEVICES,
    EstimateOptions,
    estimate,
    estimate_to_markdown,
)
from vllm_vispec.bench.roofline import (
    FREE,
    Hardware,
    PassShape,
    acceptance_length,
    draft_shape,
    predict,
    target_shape,
)
from vllm_vispec.utils.errors import ViSpecError

# Limits


@pytest.mark.parametrize("k", [1, 3, 8])
def test_perfect_acceptance_and_a_free_draft_give_k_plus_one(k: int) -> None:
    assert speedup(PERFECT, k, draft=FREE) == pytest.approx(k + 1)


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("batch", [1, 16, 256])
def test_without_acceptance_it_is_slower_than_plain(k: int, batch: int) -> None:
    assert speedup((0.0,) * 8, k, batch) < 1


def test_without_drafts_it_is_plain() -> None:
    assert speedup(k=0) == 1


def test_a_pass_at_batch_1_is_bound_by_bandwidth_and_verifying_is_free() -> None:
    one = predict(TARGET, DRAFT, HARDWARE, TYPICAL, 4, 1, 500)
    assert (one.plain_bound, one.verify_bound, one.draft_bound) == ("bandwidth",) * 3
    assert one.verify_s == one.plain_s


def test_a_large_batch_is_bound_by_compute_and_loses() -> None:
    one = predict(TARGET, FREE, replace(HARDWARE, pass_overhead_s=0), TYPICAL, 4, 1024, 1)
    assert one.verify_bound == one.plain_bound == "compute"
    # Every drafted token costs as much as a decoded one: what is rejected is lost.
    assert one.decode_speedup == pytest.approx(one.tokens_per_round / 5)


def test_it_rises_with_the_acceptance_of_every_position() -> None:
    for position in range(4):
        better = list(TYPICAL)
        better[position] += 0.02
        assert speedup(tuple(better)) > speedup(TYPICAL)
    rates = [speedup(tuple((rate / 10) ** k for k in (1, 2, 3, 4))) for rate in range(11)]
    assert rates == sorted(rates)


def test_it_falls_with_the_batch_and_never_exceeds_the_tokens_of_a_round() -> None:
    found = [speedup(batch=batch, context=1) for batch in (1, 64, 256, 1024)]
    assert found == sorted(found, reverse=True)
    assert found[0] < acceptance_length(TYPICAL, 4)


def test_a_smaller_draft_and_less_context_for_it_gain() -> None:
    args = (TARGET, DRAFT, HARDWARE, TYPICAL, 4, 64, 4000)
    assert predict(*args, 1000).decode_speedup > predict(*args).decode_speedup
    assert speedup(draft=PassShape(0.7e9, 0.25e9, 0.1e9)) > speedup()


# Numbers by hand


def test_numbers_worked_out_by_hand() -> None:
    target = PassShape(1000, 400, 100, kv_bytes_per_token=10, attention_flops_per_token=4)
    draft = PassShape(200, 50, 50, kv_bytes_per_token=1)
    hardware = Hardware(bandwidth=100, flops=500, pass_overhead_s=0.5)
    one = predict(target, draft, hardware, (0.5, 0.25), 2, 2, 5)
    # plain: 1000 + 2 * 5 * 10 = 1100 bytes, 11 s; 2 * (2 * 400 + 2 * 100) + 2 * 5 * 4 = 2040 FLOP
    assert one.plain_s == pytest.approx(0.5 + 11)
    # verify: 6 tokens, 6 rows: 2 * 6 * 500 + 6 * 5 * 4 = 6120 FLOP, 12.24 s
    assert one.verify_s == pytest.approx(0.5 + 12.24)
    assert (one.plain_bound, one.verify_bound) == ("bandwidth", "compute")
    # draft: 200 + 2 * 5 = 210 bytes, 2.1 s; first 2 * (6 * 50 + 2 * 50) = 800 FLOP, 1.6 s
    assert one.draft_first_s == one.draft_step_s == pytest.approx(0.5 + 2.1)
    assert one.tokens_per_round == 1.75
    assert one.round_s == pytest.approx(12.74 + 2.6 + 2.6)
    assert one.seconds_per_token == pytest.approx(17.94 / 1.75)
    assert one.decode_speedup == pytest.approx(1.75 * 11.5 / 17.94)


def test_sizes_of_a_published_target_and_its_head(tmp_path: Path) -> None:
    target = folder(tmp_path / "target", QWEN_7B)
    head = folder(tmp_path / "head", {**QWEN_7B, "num_key_value_heads": 28})
    # A layer: 3584 * (2 * 3584 + 2 * 512 + 3 * 18944) = 233046016; lm_head: 3584 * 152064.
    shape = target_shape(target)
    assert shape.token_parameters == 28 * 233_046_016
    assert shape.row_parameters == 544_997_376
    assert shape.weight_bytes == 2 * (28 * 233_046_016 + 544_997_376)
    assert shape.kv_bytes_per_token == 57_344
    assert shape.attention_flops_per_token == 4 * 28 * 28 * 128
    # A head has one layer (here with 28 key heads), fc of 3584 x 7168, and the target's lm_head.
    drafts = draft_shape(head, target)
    assert drafts.token_parameters == 3584 * (4 * 3584 + 3 * 18944) + 2 * 3584**2
    assert drafts.row_parameters == shape.row_parameters
    assert drafts.kv_bytes_per_token == 2 * 2 * 3584
    small = draft_shape(head, target, draft_vocab=32_000)
    assert small.row_parameters == 3584 * 32_000


def test_sizes_under_text_config_and_fp8(tmp_path: Path) -> None:
    nested = folder(tmp_path / "nested", {"model_type": "x", "text_config": QWEN_7B})
    flat = folder(tmp_path / "flat", QWEN_7B)
    assert target_shape(nested) == target_shape(flat)
    fp8 = target_shape(flat, "fp8")
    # Layers in one byte; lm_head, keys and values stay in two.
    assert fp8.weight_bytes == 28 * 233_046_016 + 2 * 544_997_376
    assert fp8.kv_bytes_per_token == 57_344


def test_the_shipped_pair_has_sizes() -> None:
    target = target_shape(CHECKPOINTS / "target")
    draft = draft_shape(CHECKPOINTS / "vispec_head", CHECKPOINTS / "target")
    assert 17e6 < target.token_parameters < 20e6
    assert 0 < draft.weight_bytes < target.weight_bytes / 10


@pytest.mark.parametrize("name", ["h100-sxm", "h200", "a100-80gb", "l40s"])
def test_public_figures_are_sourced_and_dense(tmp_path: Path, name: str) -> None:
    device = DEVICES[name]
    assert "NVIDIA" in device.source
    assert 100 < device.half < 1000
    whole = options(
        tmp_path, device=name, bandwidth_share=1, compute_share=1, pass_overhead_ms=0
    ).hardware()
    assert whole == Hardware(device.terabytes * 1e12, device.half * 1e12, 0)


def test_public_figures() -> None:
    assert {name: (one.terabytes, one.half) for name, one in DEVICES.items()} == {
        "h100-sxm": (3.35, 989.4),
        "h200": (4.8, 989.4),
        "a100-80gb": (2.039, 312.0),
        "l40s": (0.864, 362.05),
    }


# What users give


def test_the_table_is_marked_as_an_estimate_and_names_its_assumptions(tmp_path: Path) -> None:
    content = estimate(options(tmp_path, num_speculative_tokens=(2, 4), batch_size=(1, 64)))
    text = estimate_to_markdown(content)
    assert text.startswith("**estimate")
    assert "decode_speedup (estimate)" in text
    assert "NVIDIA H100 data sheet" in text
    assert "0.2 ms of every pass" in text
    assert len(content["rows"]) == 4
    assert content["kind"] == "estimate"
    assert all(row["kind"] == "estimate" for row in content["rows"])
    row, *_ = content["rows"]
    ends = row["decode_speedup_by_overhead"]
    assert ends["twice"] < row["decode_speedup"] < ends["without"]
    assert json.loads(json.dumps(content)) == content


def test_the_schedule_is_what_vllm_takes(tmp_path: Path) -> None:
    batches = (1, 2, 8, 64, 2048)
    found = estimate(options(tmp_path, batch_size=batches, context=64, acceptance_rate=0.6))
    schedule = found["num_speculative_tokens_per_batch_size"]
    assert schedule[0][0] == 1
    assert schedule[-1] == [2048, 2048, 0]  # nothing gains there
    assert schedule[0][2] > 0
    for (_, last, _), (first, *_) in pairwise(schedule):
        assert first == last + 1


NUMBERS: dict[str, Any] = {
    "target_parameters": 7e9,
    "head_parameters": 0.25e9,
    "lm_head_parameters": 0.5e9,
    "target_kv_bytes_per_token": 57344,
    "head_kv_bytes_per_token": 2048,
}


def test_numbers_instead_of_folders_and_of_a_device() -> None:
    found = estimate(
        EstimateOptions(
            **NUMBERS,
            bandwidth_gbs=3000,
            tflops=600,
            pass_overhead_ms=0.1,
            acceptance=TYPICAL,
            num_speculative_tokens=(4,),
            batch_size=(1,),
            context=500,
        )
    )
    assert found["rows"][0]["decode_speedup"] == pytest.approx(speedup())
    assert "bandwidth and peak as given" in estimate_to_markdown(found)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"device": "tpu"}, "--device tpu is unknown: use one of h100-sxm"),
        ({"device": None}, "give either --device"),
        ({"bandwidth_gbs": 1.0}, "give either --device"),
        ({"acceptance_rate": None}, "give either --acceptance"),
        ({"acceptance": (0.5,)}, "give either --acceptance"),
        ({"acceptance_rate": None, "acceptance": (0.5, 0.4)}, "given for 2 positions, K is 3"),
        ({"acceptance_rate": None, "acceptance": (0.5, 0.6)}, "rises"),
        ({"acceptance_rate": 1.5}, "outside 0 to 1"),
        ({"bandwidth_share": 1.2}, "--bandwidth-share 1.2 is no share"),
        ({"dtype": "float32"}, "no public peak for dtype float32"),
        ({"dtype": "int3"}, "dtype int3 is unknown"),
        ({"batch_size": ()}, "at least one"),
        ({"batch_size": (0,)}, "--batch-size of at least 1"),
        ({"num_speculative_tokens": (2, -1)}, "--num-speculative-tokens -1 is negative"),
        ({"context": -1.0}, "--context -1.0 is negative"),
        ({"lm_head_parameters": -1.0}, "--lm-head-parameters -1.0 is negative"),
        ({"target": None}, r"give either --target \(a folder\) or --target-parameters"),
        ({"head_parameters": 1e9}, r"give either --head \(a folder\) or --head-parameters"),
        ({"head": None, "head_parameters": 1e9, "target_kv_bytes_per_token": 1.0}, "leave it out"),
        ({"target": None, "target_parameters": 7e9}, "--head is a folder, the target is given"),
        ({"draft_vocab": 10**9}, "--draft-vocab 1000000000 is outside"),
    ],
)
def test_wrong_settings_name_themselves(
    tmp_path: Path, others: dict[str, object], said: str
) -> None:
    with pytest.raises(ViSpecError, match=said):
        estimate(options(tmp_path, **others))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts": 64}, "mixture of experts"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"torch_dtype": "int8"}, "dtype int8 is unknown"),
    ],
)
def test_configs_that_cannot_be_counted_are_refused(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    with pytest.raises(ViSpecError, match=said):
        target_shape(folder(tmp_path / "target", {**QWEN_7B, **change}))


def test_unreadable_folders_and_heads_of_other_targets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ViSpecError, match=r"has no readable config\.json"):
        target_shape(tmp_path / "nowhere")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    with pytest.raises(ViSpecError, match=r"has no readable config\.json .*column"):
        target_shape(tmp_path / "bad")
    target = folder(tmp_path / "target", QWEN_7B)
    head = folder(tmp_path / "head", {**QWEN_7B, "hidden_size": 2048})
    with pytest.raises(ViSpecError, match="hidden_size 2048, the target 3584"):
        draft_shape(head, target)
