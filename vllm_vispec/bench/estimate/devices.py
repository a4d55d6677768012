"""Public figures of a few GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_vispec.bench.estimate.roofline import Hardware
from vllm_vispec.errors import ViSpecError

BANDWIDTH_SHARE = 0.8
"""Assumed share of the public bandwidth that a pass reaches; no measurement of ours."""
COMPUTE_SHARE = 0.6
"""Assumed share of the public peak that matrix products reach; no measurement of ours."""
PASS_OVERHEAD_S = 0.0002
"""Assumed seconds of a pass that are neither reading nor computing; no measurement of ours."""


@dataclass(frozen=True)
class Device:
    """What a maker says about a device.

    Attributes:
        name: key in `DEVICES`.
        bandwidth: bytes/s of device memory.
        flops: dtype -> peak FLOP/s of dense matrix products (sparsity not counted).
        source: where the figures are from.
    """

    name: str
    bandwidth: float
    flops: Mapping[str, float]
    source: str

    def hardware(
        self,
        dtype: str = "bfloat16",
        *,
        bandwidth_share: float = BANDWIDTH_SHARE,
        compute_share: float = COMPUTE_SHARE,
        pass_overhead_s: float = PASS_OVERHEAD_S,
    ) -> Hardware:
        """Return the rates to calculate with: the public ones times what is assumed of them.

        Raises:
            ViSpecError: there is no peak for the dtype, or a share is impossible.
        """
        if dtype not in self.flops:
            raise ViSpecError(
                f"device {self.name} has no public peak for dtype {dtype} here (known: "
                f"{', '.join(self.flops)}): give --tflops and --bandwidth-gbs"
            )
        for name, share in (("bandwidth", bandwidth_share), ("compute", compute_share)):
            if not 0 < share <= 1:
                raise ViSpecError(f"--{name}-share {share} is no share: use more than 0, at most 1")
        return Hardware(
            self.bandwidth * bandwidth_share, self.flops[dtype] * compute_share, pass_overhead_s
        )


def _half(tflops: float, **others: float) -> dict[str, float]:
    """Peaks in FLOP/s; both 16-bit types have the same."""
    named = {"bfloat16": tflops, "float16": tflops, **others}
    return {dtype: value * 1e12 for dtype, value in named.items()}


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            "h100-sxm",
            3.35e12,
            _half(989.4, fp8=1978.9),
            "NVIDIA H100 data sheet, SXM column, its TFLOPS with sparsity halved",
        ),
        Device(
            "h200",
            4.8e12,
            _half(989.4, fp8=1978.9),
            "NVIDIA H200 data sheet, SXM column, its TFLOPS with sparsity halved",
        ),
        Device(
            "a100-80gb",
            2.039e12,
            _half(312.0),
            "NVIDIA A100 80GB data sheet, SXM column",
        ),
        Device(
            "l40s",
            0.864e12,
            _half(362.05, fp8=733.0),
            "NVIDIA L40S data sheet (dense figures)",
        ),
    )
}


def get_device(name: str) -> Device:
    """Look a device up.

    Raises:
        ViSpecError: it is unknown; the message lists the known ones.
    """
    if name not in DEVICES:
        raise ViSpecError(
            f"--device {name} is unknown: use one of {', '.join(DEVICES)}, or give "
            "--bandwidth-gbs and --tflops"
        )
    return DEVICES[name]
