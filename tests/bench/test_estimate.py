"""The cost model: numbers worked out by hand, what users give, calibration."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from examples.tiny_vlm.shipped import CHECKPOINTS
from tools.tables import QWEN_7B
from vllm_vispec.bench import schema
from vllm_vispec.bench.calibrate import calibrate, measured_cells, read_measured
from vllm_vispec.bench.estimate import EstimateOptions, estimate, estimate_to_markdown
from vllm_vispec.bench.roofline import Hardware, PassShape, draft_shape, predict, target_shape
from vllm_vispec.bench.schema import CellKey, CellResult, Request
from vllm_vispec.cli.app import app
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import as_flag, parse

# A 7B target and a one-layer head on something like an H100.
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/decode_speed.json"
TARGET = PassShape(15e9, 7e9, 0.5e9, kv_bytes_per_token=57344)
DRAFT = PassShape(1.5e9, 0.25e9, 0.5e9, kv_bytes_per_token=2048)
FREE = PassShape(0.0, 0.0, 0.0)
HARDWARE = Hardware(bandwidth=3e12, flops=6e14)
TYPICAL = (0.8, 0.6, 0.45, 0.35, 0.25, 0.2, 0.15, 0.1)
TINY_TARGET, TINY_HEAD = CHECKPOINTS / "target", CHECKPOINTS / "vispec_head"


def folder(path: Path, config: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


# Limits


def test_limits() -> None:
    one = predict(TARGET, FREE, HARDWARE, (1.0,) * 3, 3, 1, 500)
    assert one.decode_speedup == pytest.approx(4)  # all is accepted and drafts cost nothing
    # At batch 1 all passes are bound by bandwidth, and verifying costs as much as decoding.
    assert (one.plain_bound, one.verify_bound, one.verify_s) == (*["bandwidth"] * 2, one.plain_s)
    one = predict(TARGET, FREE, HARDWARE, TYPICAL, 4, 1024, 1)
    # Bound by compute, every drafted token costs as much as a decoded one.
    assert one.verify_bound == one.plain_bound == "compute"
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
    assert one.step_s == pytest.approx(12.74 + 2.6 + 2.6)
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


def test_a_published_model_has_a_pass_more(tmp_path: Path) -> None:
    target = folder(tmp_path / "target", QWEN_7B)
    small = {**QWEN_7B, "num_hidden_layers": 2}
    draft = draft_shape(folder(tmp_path / "draft", {**small, "vision_config": {}}), target)
    assert draft == replace(target_shape(folder(tmp_path / "text", small)), passes_more=1)
    steps = [
        predict(TARGET, replace(DRAFT, passes_more=more), HARDWARE, TYPICAL, 3, 1, 500)
        for more in (0, 1)
    ]
    assert steps[1].step_s == pytest.approx(steps[0].step_s + steps[0].draft_step_s)


@pytest.mark.parametrize(
    ("config", "tensor", "kv_bytes", "passes_more"),
    [
        ({"vision_config": {}}, "imadpt.q", 2048, 0),
        ({"hidden_size": 1792}, "model.layers.0.mlp.down_proj.weight", 28 * 1024, 1),
    ],
    ids=["a head with its target's config.json", "a text model"],
)
def test_weights_tell_heads_and_models_apart(
    tmp_path: Path, config: dict[str, Any], tensor: str, kv_bytes: int, passes_more: int
) -> None:
    target = folder(tmp_path / "target", QWEN_7B)
    draft = folder(tmp_path / "draft", QWEN_7B | config)
    save_file({tensor: torch.zeros(1, 1)}, draft / "model.safetensors")
    found = draft_shape(draft, target)
    assert (found.kv_bytes_per_token, found.passes_more) == (kv_bytes, passes_more)


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


def test_numbers_instead_of_folders_and_of_a_device() -> None:
    numbers = {
        "target_parameters": 7e9,
        "head_parameters": 0.25e9,
        "lm_head_parameters": 0.5e9,
        "target_kv_bytes_per_token": 57344,
        "head_kv_bytes_per_token": 2048,
    }
    rates = {"bandwidth_gbs": 3000, "tflops": 600, "pass_overhead_ms": 0, "acceptance": TYPICAL}
    sizes = {"num_speculative_tokens": (4,), "batch_size": (1,), "context": 500}
    found = estimate(parse(EstimateOptions, numbers | rates | sizes))
    expected = predict(TARGET, DRAFT, HARDWARE, TYPICAL, 4, 1, 500)
    assert found["rows"][0]["decode_speedup"] == pytest.approx(expected.decode_speedup)
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
    ("content", "said"),
    [
        (None, r"has no readable config\.json"),
        ("{", r"has no readable config\.json .*column"),
        ({"num_experts": 64}, "mixture of experts"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, r"vocab_size in .*config\.json is 'many': give a whole number"),
        ({"torch_dtype": "int8"}, "dtype int8 is unknown"),
        ({"hidden_size": 2048}, "hidden_size 2048, the target 3584"),
    ],
)
def test_models_that_cannot_be_counted_are_refused(
    tmp_path: Path, content: dict[str, object] | str | None, said: str
) -> None:
    target, head = folder(tmp_path / "target", QWEN_7B), tmp_path / "head"
    if isinstance(content, dict):
        folder(head, {**QWEN_7B, **content})
    elif content is not None:
        head.mkdir()
        (head / "config.json").write_text(content)
    with pytest.raises(ViSpecError, match=said):
        _ = target_shape(head), draft_shape(head, target)


def options(tmp_path: Path, **others: object) -> EstimateOptions:
    target = folder(tmp_path / "target", QWEN_7B)
    head = folder(tmp_path / "head", QWEN_7B)
    settings = {"device": "h100-sxm", "acceptance_rate": 0.7, "target": target, "head": head}
    return parse(EstimateOptions, {**settings, **others}, as_flag)


# Calibration

TRUTH = Hardware(bandwidth=3e9, flops=4e10, pass_overhead_s=1e-3)
ROUNDS = 1000


def tiny_shapes() -> tuple[PassShape, PassShape]:
    """The shipped pair's."""
    shape = draft_shape(TINY_HEAD, TINY_TARGET, "float32")
    return target_shape(TINY_TARGET, "float32"), shape


def test_the_form_of_the_model_fits_what_was_measured_on_the_shipped_pair() -> None:
    """Committed measurements, so that no clock is involved."""
    cells = read_measured(RESULTS, "vispec", 150)
    found = calibrate(cells, *tiny_shapes())["held_out"]
    assert found["cells"] == len(cells) // 2 - 1
    assert found["decode_speedup"]["mean_error"] < 0.10
    assert found["decode_speedup"]["worst_error"] < 0.20


def cell(
    key: CellKey,
    seconds: float,
    accepted: tuple[int, ...] | None = None,
    repetition: int = 0,
    error: str | None = None,
) -> CellResult:
    """A cell with an answer of 100 tokens to a prompt of 101, and a request that failed."""
    requests = (
        Request("a", "charts", "x", 100, 101, 0.5, 0.5 + seconds, ()),
        Request("b", "charts", "", 0, 0, 0.0, 0.0, (), "refused"),
    )
    k = key.num_speculative_tokens
    spec = accepted and schema.SpecCounters(ROUNDS, k * ROUNDS, sum(accepted), accepted)
    memory = schema.MemoryFacts()
    return CellResult(key, repetition, requests, 1.0, spec or None, memory, "cmd", error)


def test_measured_cells_pool_repetitions_and_leave_failures_out() -> None:
    plain, ours, eagle = (CellKey(x, 2, 3, 0.0, -1, "tiny") for x in ("plain", "vispec", "eagle"))
    cells = (
        cell(plain, 19.8),
        cell(plain, 39.6, repetition=1),
        cell(ours, 9.9, (800, 500, 200)),
        cell(ours, 9.9, (600, 300, 0), 1),
        cell(ours, 90.0, (800, 500, 200), 2, error="server died"),
        cell(eagle, 9.9, (800, 500, 200)),
    )
    found = measured_cells(schema.BenchRun(1, {}, {}, cells), "vispec").round(6)
    assert found.to_numpy().tolist() == [
        [2, 0, 151, (), 0.3, 3],
        [2, 3, 151, (0.7, 0.4, 0.1), 0.1, 3],
    ]


def run_folder(path: Path, batches: tuple[int, ...], ks: tuple[int, ...]) -> Path:
    """A run whose times are those of a machine with the rates `TRUTH`."""
    path.mkdir()
    run = {"format": schema.FORMAT, "machine": {}, "settings": {}}
    (path / schema.RUN_FILE).write_text(json.dumps(run))
    lines = []
    for batch, k, variant in product(batches, ks, ("plain", "vispec")):
        drafts = k if variant == "vispec" else 0
        one = predict(*tiny_shapes(), TRUTH, TYPICAL, drafts, batch, 151)
        accepted = tuple(round(ROUNDS * rate) for rate in TYPICAL[:k]) if drafts else None
        key = CellKey(variant, batch, k, 0.0, -1, "tiny")
        made = cell(key, 99 * one.seconds_per_token, accepted)
        lines.append(json.dumps(made.to_json()) + "\n")
    (path / schema.CELLS_FILE).write_text("".join(lines))
    return path


def test_cells_held_out_of_a_run_are_predicted(tmp_path: Path) -> None:
    run, output = run_folder(tmp_path / "run", (1, 4, 16), (2, 4)), tmp_path / "found.json"
    pair = ("--target", str(TINY_TARGET), "--head", str(TINY_HEAD), "--dtype", "float32")
    words = ("calibrate", str(run), *pair, "--hold-out", "batch=4", "--output", str(output))
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    for name, rate in asdict(TRUTH).items():
        assert found["hardware"][name] == pytest.approx(rate, rel=0.02)
    assert (found["fitted"]["cells"], found["held_out"]["cells"]) == (8, 4)
    assert found["held_out"]["decode_speedup"]["worst_error"] < 0.01
    assert "3 GB/s effective, 40 GFLOP/s" in result.output
    rows = [line for line in result.output.splitlines() if "| held out |" in line]
    starts = [row.split(" | ")[:2] for row in rows if row.startswith("| 4 ")]
    assert starts == [["| 4", k] for k in ("plain", "plain", "2", "4")]


@pytest.mark.parametrize(
    ("hold_out", "said"),
    [
        *((text, "use every-third, batch=16,32 or k=5") for text in ("batch", "batch=", "k=x")),
        ("batch=1", "0 measured cells are too few"),
    ],
)
def test_cells_that_cannot_be_held_out(hold_out: str, said: str) -> None:
    with pytest.raises(ViSpecError, match=said):
        calibrate(read_measured(RESULTS, "vispec", 150), TARGET, DRAFT, hold_out)


@pytest.mark.parametrize(
    ("path", "variant", "context", "said"),
    [
        ("run", "eagle", None, "no finished cell of --variant eagle"),
        ("missing.json", "vispec", 100, r"cannot be read .*No such file"),
        ("wrong.json", "vispec", 100, r"cannot be read as a result of .*KeyError"),
        (str(RESULTS), "vispec", None, "give --context"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, path: str, variant: str, context: float | None, said: str
) -> None:
    (tmp_path / "wrong.json").write_text('{"results": [{"num_speculative_tokens": 3}]}')
    run_folder(tmp_path / "run", (1,), (2,))
    with pytest.raises(ViSpecError, match=said):
        read_measured(tmp_path / path, variant, context)
