"""`vispec bench estimate`: from a user's settings to a table of estimates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import Field, model_validator

from vllm_vispec.bench.roofline import (
    DecoderSizes,
    Hardware,
    PassShape,
    draft_shape,
    predict,
    target_shape,
)
from vllm_vispec.bench.schedules import best_schedule
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import CommaSeparated, Settings

NOTE = "estimate: a roofline calculation, not a measurement"


class Device(NamedTuple):
    """What NVIDIA's data sheet says: TB/s, and dense peaks in TFLOP/s with 16 and 8 bits."""

    terabytes: float
    half: float
    fp8: float | None
    source: str


_HALVED = "data sheet, SXM column, its TFLOPS with sparsity halved"
DEVICES = {
    "h100-sxm": Device(3.35, 989.4, 1978.9, f"NVIDIA H100 {_HALVED}"),
    "h200": Device(4.8, 989.4, 1978.9, f"NVIDIA H200 {_HALVED}"),
    "a100-80gb": Device(2.039, 312.0, None, "NVIDIA A100 80GB data sheet, SXM column"),
    "l40s": Device(0.864, 362.05, 733.0, "NVIDIA L40S data sheet (dense figures)"),
}


class EstimateOptions(Settings):
    """What to estimate; the defaults of the shares and the overhead are assumptions of ours."""

    target: Path | None = Field(None, description="Target's folder; config.json is enough.")
    head: Path | None = Field(None, description="Head's folder. It needs a target's folder.")
    device: str | None = Field(None, description="A GPU that is known by name.")
    bandwidth_gbs: float | None = Field(None, ge=0, description="GB/s as reached.")
    tflops: float | None = Field(None, ge=0, description="TFLOP/s as reached.")
    acceptance: Annotated[tuple[float, ...], CommaSeparated] = Field(
        (), description="Share of steps that accept each position, e.g. 0.8,0.6,0.5."
    )
    acceptance_rate: float | None = Field(
        None, ge=0, description="Probability at every position, given the one before."
    )
    num_speculative_tokens: Annotated[tuple[int, ...], CommaSeparated] = Field(
        (1, 2, 3, 4, 5),
        description="K.",
        json_schema_extra={"flags": ["--num-speculative-tokens", "-k"]},
    )
    batch_size: Annotated[tuple[int, ...], CommaSeparated] = Field(
        (1, 2, 4, 8, 16, 32, 64), description="Sequences decoded at once."
    )
    context: float = Field(1024.0, ge=0, description="Tokens of context per sequence.")
    draft_vocab: int | None = Field(None, description="Rows of a smaller lm_head for the draft.")
    dtype: str | None = Field(None, description="Instead of config.json's.")
    bandwidth_share: float = Field(
        0.8, gt=0, le=1, description="Share of a device's public bandwidth that is reached."
    )
    compute_share: float = Field(
        0.6, gt=0, le=1, description="Share of a device's public peak that is reached."
    )
    pass_overhead_ms: float = Field(
        0.2, ge=0, description="Of every pass, neither reading nor computing."
    )
    target_parameters: float | None = Field(
        None, ge=0, description="Instead of --target: weights a token passes."
    )
    target_bytes_per_parameter: float = Field(2.0, ge=0, description="E.g. 2 for bfloat16.")
    head_parameters: float | None = Field(
        None, ge=0, description="Instead of --head: weights a token passes."
    )
    head_bytes_per_parameter: float = Field(2.0, ge=0, description="E.g. 2 for bfloat16.")
    target_kv_bytes_per_token: float | None = Field(
        None, ge=0, description="With numbers: keys and values of a token, all layers."
    )
    head_kv_bytes_per_token: float | None = Field(
        None, ge=0, description="The same of the head's one layer."
    )
    lm_head_parameters: float = Field(
        0.0, ge=0, description="With numbers: hidden size times vocabulary."
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        """Refuse settings that are missing or exclude each other."""
        rates = (self.bandwidth_gbs, self.tflops)
        if any(rates) if self.device else not all(rates):
            raise ViSpecError("give either --device, or both --bandwidth-gbs and --tflops")
        if (not self.acceptance) == (self.acceptance_rate is None):
            raise ViSpecError("give either --acceptance (per position) or --acceptance-rate")
        if min(self.num_speculative_tokens, default=-1) < 0 or min(self.batch_size, default=0) < 1:
            raise ViSpecError("give at least one -k of 0 or more, and one --batch-size from 1 on")
        for name in ("target", "head"):
            folder = getattr(self, name)
            if (folder is None) == (getattr(self, f"{name}_parameters") is None):
                raise ViSpecError(f"give either --{name} (a folder) or --{name}-parameters")
            if folder is not None and getattr(self, f"{name}_kv_bytes_per_token") is not None:
                raise ViSpecError(
                    f"--{name}-kv-bytes-per-token goes with --{name}-parameters: leave it out, "
                    f"{folder}/config.json tells it"
                )
        if self.head is not None and self.target is None:
            raise ViSpecError(
                "--head is a folder, the target is given by numbers: give --target as a folder, or "
                "the head by numbers"
            )
        return self

    def hardware(self) -> Hardware:
        """Return the rates given, or a device's times the share of them that is reached."""
        overhead = self.pass_overhead_ms / 1000
        if self.bandwidth_gbs and self.tflops:
            return Hardware(self.bandwidth_gbs * 1e9, self.tflops * 1e12, overhead)
        device = DEVICES.get(str(self.device))
        if device is None:
            raise ViSpecError(
                f"--device {self.device} is unknown: use one of {', '.join(DEVICES)}, or give "
                "--bandwidth-gbs and --tflops"
            )
        dtype = self.dtype or "bfloat16"
        if self.target is not None:
            dtype = DecoderSizes.read(self.target, "target", self.dtype).dtype
        peak = {"bfloat16": device.half, "float16": device.half, "fp8": device.fp8}.get(dtype)
        if peak is None:
            raise ViSpecError(
                f"--device {self.device} has no public peak for dtype {dtype} here: give --tflops "
                "and --bandwidth-gbs"
            )
        bandwidth = device.terabytes * 1e12 * self.bandwidth_share
        return Hardware(bandwidth, peak * 1e12 * self.compute_share, overhead)

    def shapes(self) -> tuple[PassShape, PassShape]:
        """Return those of target and draft."""
        if self.target is None:
            return self._by_numbers("target"), self._by_numbers("head")
        target = target_shape(self.target, self.dtype)
        if self.head is None:
            return target, self._by_numbers("head")
        return target, draft_shape(self.head, self.target, self.dtype, self.draft_vocab)

    def _by_numbers(self, name: str) -> PassShape:
        """The FLOPs of attention are left out."""
        parameters, lm_head = getattr(self, f"{name}_parameters"), self.lm_head_parameters
        read = (parameters + lm_head) * getattr(self, f"{name}_bytes_per_parameter")
        kv_bytes = getattr(self, f"{name}_kv_bytes_per_token") or 0.0
        return PassShape(read, parameters, lm_head, kv_bytes)


def estimate(options: EstimateOptions) -> dict[str, Any]:
    """Estimate every batch size (outer) and K, also with no overhead and with twice as much.

    Raises:
        ViSpecError: a setting or a config.json cannot be used.
    """
    hardware, (target, draft) = options.hardware(), options.shapes()
    rate, longest = options.acceptance_rate, max(options.num_speculative_tokens)
    accepted = options.acceptance
    if rate is not None:
        accepted = tuple(rate**k for k in range(1, longest + 1))
    rows, speedups = [], defaultdict[int, dict[int, float]](dict)
    for batch, k in product(options.batch_size, options.num_speculative_tokens):
        work = (accepted, k, batch, options.context)
        mid, low, high = (
            predict(target, draft, replace(hardware, pass_overhead_s=x), *work)
            for x in (hardware.pass_overhead_s, 0.0, 2 * hardware.pass_overhead_s)
        )
        ends = {"without": low.decode_speedup, "twice": high.decode_speedup}
        rows.append({"kind": "estimate", **asdict(mid), "decode_speedup_by_overhead": ends})
        speedups[batch][k] = mid.decode_speedup
    return {
        "kind": "estimate",
        "note": NOTE,
        "settings": options.model_dump(mode="json"),
        "hardware": asdict(hardware),
        "target": asdict(target),
        "draft": asdict(draft),
        "num_speculative_tokens_per_batch_size": [list(one) for one in best_schedule(speedups)],
        "rows": rows,
    }


def estimate_to_markdown(found: Mapping[str, Any]) -> str:
    """Return the table, the assumptions below it."""
    from vllm_vispec.bench.pages import to_markdown

    device = DEVICES.get(found["settings"]["device"])
    return to_markdown("estimate.md.j2", estimate=found, device=device)
