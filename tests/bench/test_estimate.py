"""The cost model: its limits, numbers worked out by hand, what users give."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.bench.pairs_to_estimate import (
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
    EstimateOptions,
    estimate,
    estimate_to_markdown,
)
from vllm_vispec.bench.roofline import (
    FREE,
    Hardware,
    PassShape,
    draft_shape,
    predict,
    target_shape,
)
from vllm_vispec.utils.errors import ViSpecError

# Limits


@pytest.mark.parametrize("k", [1, 3, 8])
def test_perfect_acceptance_and_a_free_draft_give_k_plus_one(k: int) -> None:
    assert speedup(PERFECT, k, draft=FREE) == pytest.approx(k + 1)


def test_a_pass_at_batch_1_is_bound_by_bandwidth_and_verifying_is_free() -> None:
    one = predict(TARGET, DRAFT, HARDWARE, TYPICAL, 4, 1, 500)
    assert (one.plain_bound, one.verify_bound, one.draft_bound) == ("bandwidth",) * 3
    assert one.verify_s == one.plain_s


def test_a_large_batch_is_bound_by_compute_and_loses() -> None:
    one = predict(TARGET, FREE, replace(HARDWARE, pass_overhead_s=0), TYPICAL, 4, 1024, 1)
    assert one.verify_bound == one.plain_bound == "compute"
    # Every drafted token costs as much as a decoded one: what is rejected is lost.
    assert one.decode_speedup == pytest.approx(one.tokens_per_round / 5)


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


# What users give


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
