"""The generated tables of the documentation, as Markdown, from the code they describe."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.tiny_vlm.shipped import CHECKPOINTS
from tools.house import ROOT

if TYPE_CHECKING:
    from vllm_vispec.bench.estimate import EstimateOptions

HEAD_SIZES = (64, 80, 96, 128)
DEPTHS = (3, 5, 7)
# Name for --attention-backend, module, class and where it was seen to run with trees.
BACKENDS: Mapping[str, tuple[str, str, str]] = {
    "CPU_ATTN": ("cpu_attn", "CPUAttentionBackend", "tested (float32, bfloat16)"),
    "FLASH_ATTN": ("flash_attn", "FlashAttentionBackend", "untested"),
    "TRITON_ATTN": ("triton_attn", "TritonAttentionBackend", "untested"),
    "FLEX_ATTENTION": ("flex_attention", "FlexAttentionBackend", "untested"),
    "ROCM_ATTN": ("rocm_attn", "RocmAttentionBackend", "untested"),
    "ROCM_AITER_FA": ("rocm_aiter_fa", "AiterFlashAttentionBackend", "untested"),
}
BATCHES = (1, 8, 32, 64, 128)
# Constant rates with which a chain of five accepts as many drafts as these figures say.
PUBLISHED = {
    "MMSpec's rerun, 1.29 accepted": 0.58,
    "the paper at temperature 1, 1.66": 0.655,
    "the paper, greedy, 2.24": 0.745,
}
DRAFT_VOCAB = 32768
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


def patch_points() -> str:
    """All patch points, one table a feature."""
    from vllm_vispec.compat.groups import GROUPS

    parts = []
    for group in GROUPS:
        lines = ["| patch point | expected parameters | use | why |", "|---|---|---|---|"]
        for point in group.points:
            named = [name for symbol in point.symbols for name in symbol.parameters]
            cells = f"`{point.name}`", ", ".join(named) or "-", point.use, point.reason
            lines.append(f"| {' | '.join(cells)} |")
        title = group.title[0].upper() + group.title[1:]
        parts.append(f"\n## {title}\n\nNeeded for: {group.feature}.\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def targets() -> str:
    """Every family of targets that is known."""
    from vllm_vispec.heads.families import families

    titles = (
        "family", "`model_type`", "published sizes", "tokens of an image", "positions", "state",
        "published drafts",
    )  # fmt: skip
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for one in families():
        types = ", ".join(f"`{name}`" for name in one.types)
        cells = (
            one.name, types, one.sizes, one.image_tokens, one.positions, one.state,
            one.published_drafts(),
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def metrics() -> str:
    """Every metric of a benchmark with its definition and formula."""
    from vllm_vispec.bench.metrics import METRICS

    rows = ["| metric | unit | better | definition | formula |", "|---" * 5 + "|"]
    rows += [
        f"| `{metric.name}` | {metric.unit} | {metric.better or '-'} | {metric.definition} "
        f"| {metric.formula} |"
        for metric in METRICS.values()
    ]
    return "\n".join(rows)


def head_sizes() -> str:
    """What attention backends make of heads that trees pad; a cell has one size a depth."""
    import torch

    from vllm_vispec.models.padded_heads import BackendFinder, choose_padded_head
    from vllm_vispec.trees.settings import TreeSettings

    def padded(backend: Any, head_size: int, depth: int) -> str:
        channels = TreeSettings(depth=depth).num_channels
        finder = BackendFinder(torch.bfloat16, "auto", {}, given=backend)
        head = choose_padded_head(finder, head_size, head_size + channels)
        return "refused" if head is None else str(head.size)

    titles = " | ".join(f"heads of {size}" for size in HEAD_SIZES)
    rows = [f"| backend | {titles} | state |", "|---" * (len(HEAD_SIZES) + 2) + "|"]
    for name, (module, cls, state) in BACKENDS.items():
        backend = getattr(import_module(f"vllm.v1.attention.backends.{module}"), cls)
        cells = [", ".join(padded(backend, size, d) for d in DEPTHS) for size in HEAD_SIZES]
        rows.append(f"| `{name}` | {' | '.join(cells)} | {state} |")
    return "\n".join(rows)


def estimated_speedups() -> str:
    """decode_speedup of Qwen2.5-VL-7B by load and acceptance, as the cost model says."""
    lines = ["| sequences at once | accepted 60 % | 70 % | 80 % |", "|---|---|---|---|"]
    for batch in BATCHES:
        cells = []
        for rate in (0.6, 0.7, 0.8):
            row = best_estimate(rate, batch)
            ends = row["decode_speedup_by_overhead"]
            cells.append(
                f"{row['decode_speedup']:.1f} ({ends['twice']:.1f} to {ends['without']:.1f}), "
                f"K = {row['num_speculative_tokens']}"
            )
        lines.append(f"| {batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def published_acceptance() -> str:
    """The same from published figures, with the whole and a smaller lm_head for the draft."""
    lines = [
        "| acceptance | sequences at once | whole lm_head | 32,768 rows | gain | gone below a "
        "coverage of |",
        "|---|---|---|---|---|---|",
    ]
    for name, rate in PUBLISHED.items():
        for batch in (1, 16):
            whole, small = (best_estimate(rate, batch, vocab) for vocab in (None, DRAFT_VOCAB))
            gain = small["decode_speedup"] / whole["decode_speedup"] - 1
            lines.append(
                f"| {name} | {batch} | {whole['decode_speedup']:.2f}, "
                f"K = {whole['num_speculative_tokens']} | {small['decode_speedup']:.2f}, "
                f"K = {small['num_speculative_tokens']} | {gain:+.0%} | "
                f"{break_even_coverage(rate, batch, whole['decode_speedup']):.1%} |"
            )
    return "\n".join(lines)


def break_even_coverage(rate: float, batch: int, wanted: float) -> float:
    """Return the coverage with which a smaller lm_head is as fast as the whole one."""

    def is_faster(coverage: float) -> bool:
        found = best_estimate(rate * coverage, batch, DRAFT_VOCAB)["decode_speedup"]
        return bool(found > wanted)

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if is_faster(middle) else (middle, high)
    return high


def best_estimate(rate: float, batch: int, draft_vocab: int | None = None) -> dict[str, Any]:
    """Return the estimate of the fastest K for Qwen2.5-VL-7B and a one-layer head on an H100."""
    from vllm_vispec.bench.estimate import estimate

    def rows(settings: EstimateOptions) -> list[dict[str, Any]]:
        return list(estimate(settings)["rows"])

    found = _with_qwen(
        lambda options: rows(
            options.model_copy(
                update={
                    "acceptance_rate": rate,
                    "batch_size": (batch,),
                    "draft_vocab": draft_vocab,
                }
            )
        )
    )
    return max(found, key=lambda row: row["decode_speedup"])


def _with_qwen(call: Callable[[EstimateOptions], Any]) -> Any:
    from vllm_vispec.bench.estimate import EstimateOptions
    from vllm_vispec.utils.settings import parse

    with tempfile.TemporaryDirectory() as name:
        folders = Path(name, "target"), Path(name, "vispec_head")
        for folder, config in zip(
            folders, (QWEN_7B, {**QWEN_7B, "num_key_value_heads": 28}), strict=True
        ):
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        target, head = folders
        return call(
            parse(
                EstimateOptions,
                {
                    "target": target,
                    "head": head,
                    "device": "h100-sxm",
                    "acceptance_rate": 0.7,
                    "num_speculative_tokens": tuple(range(1, 8)),
                    "context": 1500,
                },
            )
        )


def calibration() -> str:
    """What the cost model says about committed measurements that it has not seen."""
    from vllm_vispec.bench.calibrate import CalibrateOptions, calibrate_run, calibration_to_markdown
    from vllm_vispec.utils.settings import parse

    target, head = CHECKPOINTS / "target", CHECKPOINTS / "vispec_head"
    settings = {"target": target, "head": head, "dtype": "float32", "hold_out": "k=5,10"}
    options = parse(CalibrateOptions, {**settings, "context": 150})
    found = calibrate_run(ROOT / "benchmarks/results/decode_speed.json", options)
    return calibration_to_markdown(found)


def trees() -> str:
    """The study of trees, from its result file."""
    from benchmarks.trees.results import to_markdown

    return to_markdown(_results("trees"))


def ablation() -> str:
    """The ablation, from its result file."""
    from benchmarks.ablation import to_markdown

    return to_markdown(_results("ablation"))


def training_step() -> str:
    """What a training step costs with other settings, from its result file."""
    from benchmarks.training_step import to_markdown

    return to_markdown(_results("training_step"))


def compressors() -> str:
    """The study of compressors, from its result file."""
    from benchmarks.compressors.page import to_markdown

    return to_markdown(_results("compressors"))


def _results(name: str) -> dict[str, Any]:
    text = (ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
