"""Checks the table of places where ViSpec touches vLLM, `vllm_vispec.compat.table`.

Entries are checked against vLLM's *source text*, so checking imports nothing and costs a few tens
of milliseconds; that is how every process can verify all of them when the plugin loads.
"""

from dataclasses import dataclass

from vllm_vispec.compat.source import find_symbol, parameter_names, parse_module
from vllm_vispec.compat.table import PATCH_POINTS, PatchPoint

__all__ = ["PATCH_POINTS", "PatchPoint", "PatchPointState", "check_patch_points", "first_broken"]


@dataclass(frozen=True)
class PatchPointState:
    """What a check found."""

    point: PatchPoint
    ok: bool
    detail: str

    @property
    def name(self) -> str:
        """The patch point's name."""
        return self.point.name

    @property
    def reason(self) -> str:
        """Why the patch point exists."""
        return self.point.reason


def check_patch_points(points: tuple[PatchPoint, ...] = PATCH_POINTS) -> list[PatchPointState]:
    """Check every patch point against the installed vLLM."""
    return [_check(point) for point in points]


def first_broken(points: tuple[PatchPoint, ...] = PATCH_POINTS) -> PatchPointState | None:
    """Return the first patch point that does not fit, or None."""
    return next((state for state in check_patch_points(points) if not state.ok), None)


def _check(point: PatchPoint) -> PatchPointState:
    tree = parse_module(point.module)
    if tree is None:
        return PatchPointState(point, False, f"module {point.module} not found")
    found = find_symbol(tree, point.symbol)
    if found is None:
        return PatchPointState(point, False, f"{point.symbol} not found in {point.module}")
    names = parameter_names(found)
    missing = [name for name in point.parameters if name not in names]
    if missing:
        return PatchPointState(point, False, f"{point.symbol} has no parameter {missing[0]!r}")
    positions = [names.index(name) for name in point.parameters]
    if positions != sorted(positions):
        return PatchPointState(point, False, f"{point.symbol} has its parameters in another order")
    return PatchPointState(point, True, "as expected")
