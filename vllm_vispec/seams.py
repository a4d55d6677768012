"""Checks the table of places where ViSpec touches vLLM, `vllm_vispec.seam_table`.

Entries are checked against vLLM's *source text*, so checking imports nothing and costs a few tens
of milliseconds; that is how every process can verify all of them when the plugin loads.
"""

from dataclasses import dataclass

from vllm_vispec.seam_source import find_symbol, parameter_names, parse_module
from vllm_vispec.seam_table import SEAMS, Seam

__all__ = ["SEAMS", "Seam", "SeamState", "check_seams", "first_broken"]


@dataclass(frozen=True)
class SeamState:
    """What a check found."""

    seam: Seam
    ok: bool
    detail: str

    @property
    def name(self) -> str:
        """The seam's name."""
        return self.seam.name

    @property
    def reason(self) -> str:
        """Why the seam exists."""
        return self.seam.reason


def check_seams(seams: tuple[Seam, ...] = SEAMS) -> list[SeamState]:
    """Check every seam against the installed vLLM."""
    return [_check(seam) for seam in seams]


def first_broken(seams: tuple[Seam, ...] = SEAMS) -> SeamState | None:
    """Return the first seam that does not fit, or None."""
    return next((state for state in check_seams(seams) if not state.ok), None)


def _check(seam: Seam) -> SeamState:
    tree = parse_module(seam.module)
    if tree is None:
        return SeamState(seam, False, f"module {seam.module} not found")
    found = find_symbol(tree, seam.symbol)
    if found is None:
        return SeamState(seam, False, f"{seam.symbol} not found in {seam.module}")
    names = parameter_names(found)
    missing = [name for name in seam.parameters if name not in names]
    if missing:
        return SeamState(seam, False, f"{seam.symbol} has no parameter {missing[0]!r}")
    positions = [names.index(name) for name in seam.parameters]
    if positions != sorted(positions):
        return SeamState(seam, False, f"{seam.symbol} has its parameters in another order")
    return SeamState(seam, True, "as expected")
