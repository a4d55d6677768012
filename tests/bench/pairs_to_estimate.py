"""A target with its head, by numbers and by config.json, for the cost model."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_vispec.bench.estimate import EstimateOptions
from vllm_vispec.bench.roofline import Hardware, PassShape, predict

# A 7B target and a one-layer head on something like an H100.
ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "examples/tiny_vlm/checkpoints"
TARGET = PassShape(15e9, 7e9, 0.5e9, kv_bytes_per_token=57344)
DRAFT = PassShape(1.5e9, 0.25e9, 0.5e9, kv_bytes_per_token=2048)
HARDWARE = Hardware(bandwidth=3e12, flops=6e14, pass_overhead_s=1e-4)
PERFECT = (1.0,) * 8
TYPICAL = (0.8, 0.6, 0.45, 0.35, 0.25, 0.2, 0.15, 0.1)
QWEN_7B = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "torch_dtype": "bfloat16",
}


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
    return EstimateOptions(**{**settings, **others})  # type: ignore[arg-type]
