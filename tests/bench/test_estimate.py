"""The cost model: numbers worked out by hand, what users give, calibration."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from examples.tiny_vlm.shipped import CHECKPOINTS
from tools.tables import QWEN_7B
from vllm_vispec.bench.calibrate import (
    MeasuredCell,
    calibrate,
    hold_out,
    measured_cells,
    read_measured,
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
from vllm_vispec.bench.schema import (
    CELLS_FILE,
    FORMAT,
    RUN_FILE,
    BenchRun,
    CellKey,
    CellResult,
    MemoryFacts,
    Request,
    SpecCounters,
)
from vllm_vispec.cli.app import app
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import as_flag, parse

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
    assert one.decode_speedup == pytest.approx(one.acceptance_length / 5)


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
    assert one.acceptance_length == 1.75
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
        ({"bandwidth_share": 1.2}, "--bandwidth-share is 1.2: give at most 1"),
        ({"dtype": "float32"}, "no public peak for dtype float32"),
        ({"dtype": "int3"}, "dtype int3 is unknown"),
        ({"batch_size": ()}, "at least one"),
        ({"batch_size": (0,)}, "one --batch-size from 1 on"),
        ({"num_speculative_tokens": (2, -1)}, "at least one -k of 0 or more"),
        ({"context": -1.0}, "--context is -1.0: give at least 0"),
        ({"lm_head_parameters": -1.0}, "--lm-head-parameters is -1.0: give at least 0"),
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


# A 7B target and a one-layer head on something like an H100.
ROOT = Path(__file__).resolve().parents[2]
TARGET = PassShape(15e9, 7e9, 0.5e9, kv_bytes_per_token=57344)
DRAFT = PassShape(1.5e9, 0.25e9, 0.5e9, kv_bytes_per_token=2048)
HARDWARE = Hardware(bandwidth=3e12, flops=6e14, pass_overhead_s=1e-4)
PERFECT = (1.0,) * 8
TYPICAL = (0.8, 0.6, 0.45, 0.35, 0.25, 0.2, 0.15, 0.1)


def speedup(
    acceptance: tuple[float, ...] = TYPICAL,
    k: int = 4,
    batch: int = 1,
    draft: PassShape = DRAFT,
    hardware: Hardware = HARDWARE,
    context: float = 500.0,
) -> float:
    return predict(TARGET, draft, hardware, acceptance, k, batch, context).decode_speedup


def folder(path: Path, config: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def options(tmp_path: Path, **others: object) -> EstimateOptions:
    target = folder(tmp_path / "target", QWEN_7B)
    head = folder(tmp_path / "head", QWEN_7B)
    settings = {"device": "h100-sxm", "acceptance_rate": 0.7, "target": target, "head": head}
    return parse(EstimateOptions, {**settings, **others}, as_flag)


# Calibration


def made_up_cells(hardware: Hardware, noise: float = 0.0) -> list[MeasuredCell]:
    cells: list[MeasuredCell] = []
    for batch in (1, 4, 16, 64, 256):
        for k in (0, 1, 2, 4, 6):
            one = predict(TARGET, DRAFT, hardware, TYPICAL, k, batch, 500)
            sign = 1 if len(cells) % 2 else -1
            seconds = one.seconds_per_token * (1 + sign * noise)
            cells.append(MeasuredCell(batch, k, 500, TYPICAL if k else (), seconds))
    return cells


def test_calibration_finds_the_rates_that_made_the_cells() -> None:
    truth = Hardware(bandwidth=2.2e12, flops=3.1e14, pass_overhead_s=4e-4)
    found = calibrate(made_up_cells(truth), TARGET, DRAFT)
    assert found["compute_seen"]
    assert found["hardware"]["bandwidth"] == pytest.approx(truth.bandwidth, rel=0.01)
    assert found["hardware"]["flops"] == pytest.approx(truth.flops, rel=0.01)
    assert found["hardware"]["pass_overhead_s"] == pytest.approx(truth.pass_overhead_s, rel=0.02)
    assert found["fitted"]["cells"] + found["held_out"]["cells"] == len(found["cells"]) == 25
    assert found["held_out"]["seconds_per_token"]["worst_error"] < 0.01
    assert found["kind"] == "estimate"


def test_the_form_of_the_model_fits_what_was_measured_on_the_shipped_pair() -> None:
    """Committed measurements, so that no clock is involved."""
    shapes = (
        target_shape(CHECKPOINTS / "target", "float32"),
        draft_shape(CHECKPOINTS / "vispec_head", CHECKPOINTS / "target", "float32"),
    )
    results = json.loads((ROOT / "benchmarks/results/decode_speed.json").read_text())["results"]
    cells = []
    for one in results:
        k, accepted = one["num_speculative_tokens"], tuple(one["acceptance_rate_per_position"])
        cells += [
            MeasuredCell(1, 0, 150, (), 1 / one["plain_tokens_per_second"], k),
            MeasuredCell(1, k, 150, accepted, 1 / one["vispec_tokens_per_second"], k),
        ]
    summary = calibrate(cells, *shapes)["held_out"]
    assert summary["cells"] == len(cells) // 2 - 1
    assert summary["decode_speedup"]["mean_error"] < 0.10
    assert summary["decode_speedup"]["worst_error"] < 0.20


def test_too_few_cells_are_refused() -> None:
    cells = made_up_cells(HARDWARE)[:4]
    with pytest.raises(ViSpecError, match="2 measured cells are too few"):
        calibrate(cells, TARGET, DRAFT, lambda cell: cell.num_speculative_tokens < 2)
    with pytest.raises(ViSpecError, match="no decode time"):
        calibrate([replace(cells[0], seconds_per_token=0.0), *cells], TARGET, DRAFT)


def cell(
    side: str, repetition: int, seconds: float, spec: SpecCounters | None, error: str | None = None
) -> CellResult:
    requests = (
        Request("a", "charts", "x", 11, 100, 0.5, 0.5 + seconds, ()),
        Request("b", "charts", "", 0, 0, 0.0, 0.0, (), "refused"),
    )
    key = CellKey(side, 2, 3, 0.0, -1, "tiny")
    return CellResult(key, repetition, requests, 1.0, spec, MemoryFacts(), "cmd", error)


def test_measured_cells_pool_repetitions_and_leave_failures_out() -> None:
    first, second = SpecCounters(10, 30, 15, (8, 5, 2)), SpecCounters(10, 30, 9, (6, 3, 0))
    cells = (
        cell("plain", 0, 2.0, None),
        cell("plain", 1, 4.0, None),
        cell("vispec", 0, 1.0, first),
        cell("vispec", 1, 1.0, second),
        cell("vispec", 2, 9.0, first, error="server died"),
        cell("eagle", 0, 1.0, first),
    )
    plain, ours = measured_cells(BenchRun(1, {}, {}, cells), "vispec")
    assert plain == MeasuredCell(2, 0, 105.5, (), plain.seconds_per_token, 3)
    assert plain.seconds_per_token == pytest.approx(0.3)
    assert ours.num_speculative_tokens == 3
    assert ours.acceptance == (0.7, 0.4, 0.1)
    assert ours.seconds_per_token == pytest.approx(0.1)


RUNNER = CliRunner()
RESULTS = ROOT / "benchmarks/results/decode_speed.json"
TINY_TARGET, TINY_HEAD = CHECKPOINTS / "target", CHECKPOINTS / "vispec_head"
PAIR = ("--target", str(TINY_TARGET), "--head", str(TINY_HEAD), "--dtype", "float32")
TRUTH = Hardware(bandwidth=3e9, flops=4e10, pass_overhead_s=1e-3)
ROUNDS = 1000


def run_folder(
    path: Path, batches: tuple[int, ...] = (1, 4, 16), ks: tuple[int, ...] = (2, 4)
) -> Path:
    """A run whose times are those of a machine with the rates `TRUTH`."""
    path.mkdir()
    (path / RUN_FILE).write_text(json.dumps({"format": FORMAT, "machine": {}, "settings": {}}))
    cells = [
        made_up(side, batch, k) for batch in batches for k in ks for side in ("plain", "vispec")
    ]
    lines = [json.dumps(cell.to_json()) + "\n" for cell in cells]
    (path / CELLS_FILE).write_text("".join(lines))
    return path


def made_up(side: str, batch: int, k: int) -> CellResult:
    shapes = target_shape(TINY_TARGET, "float32"), draft_shape(TINY_HEAD, TINY_TARGET, "float32")
    drafts = k if side == "vispec" else 0
    one = predict(*shapes, TRUTH, TYPICAL, drafts, batch, 150.5)
    seconds = 100 * one.seconds_per_token
    accepted = tuple(round(ROUNDS * share) for share in TYPICAL[:k])
    spec = SpecCounters(ROUNDS, k * ROUNDS, sum(accepted), accepted) if drafts else None
    requests = (Request("a", "charts", "x", 101, 100, 0.5, 0.5 + seconds, ()),)
    key = CellKey(side, batch, k, 0.0, -1, "tiny")
    return CellResult(key, 0, requests, 1.0, spec, MemoryFacts(), "cmd", None)


def run_command(*arguments: str) -> Any:
    return RUNNER.invoke(app, ["bench", "calibrate", *arguments])


def test_cells_held_out_of_a_run_are_predicted(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    output = tmp_path / "found.json"
    result = run_command(str(run), *PAIR, "--hold-out", "batch=4", "--output", str(output))
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    assert found["hardware"]["bandwidth"] == pytest.approx(TRUTH.bandwidth, rel=0.01)
    assert found["held_out"]["cells"] == 4
    assert found["held_out"]["decode_speedup"]["worst_error"] < 0.01
    rows = [line for line in result.output.splitlines() if "| held out |" in line]
    assert {row.split("|")[1].strip() for row in rows if row.startswith("| 4 ")} == {"4"}
    assert sum(row.startswith("| 4 | plain |") for row in rows) == 2
    assert "| batch | K | cell |" in result.output


@pytest.mark.parametrize("text", ["batch", "batch=", "side=3", "k=x"])
def test_hold_out_that_is_not_understood(text: str) -> None:
    with pytest.raises(ViSpecError, match="use every-third, batch=16,32 or k=5"):
        hold_out(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"side": "eagle"}, "no finished cell of --side eagle"),
        ({"path": "missing.json"}, r"cannot be read .*No such file"),
        ({"path": "wrong.json"}, r"cannot be read as a result of .*KeyError"),
        ({"path": str(RESULTS), "context": None}, "give --context"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "wrong.json").write_text('{"results": [{"num_speculative_tokens": 3}]}')
    run = run_folder(tmp_path / "run", (1,), (2,))
    given = {"path": str(run), "side": "vispec", "context": 100.0, **change}
    with pytest.raises(ViSpecError, match=said):
        read_measured(tmp_path / given["path"], given["side"], given["context"])
