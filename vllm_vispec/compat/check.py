"""Checks patch points against the installed vLLM, a feature's group when the feature is used.

Entries are compared with vLLM's *source text*: nothing is imported, and only the modules that a
group names are read.  A check of what plain V2 chains need takes about 15 ms.
"""

from dataclasses import dataclass

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint, Runner
from vllm_vispec.compat.source import find_parameters, read_module
from vllm_vispec.compat.versions import supported_range
from vllm_vispec.utils.errors import ViSpecError


@dataclass(frozen=True)
class PatchPointState:
    """What a check found.

    Attributes:
        point: What was checked.
        problem: What does not fit, None if it fits.
    """

    point: PatchPoint
    problem: str | None

    @property
    def ok(self) -> bool:
        """Whether the patch point fits."""
        return self.problem is None


def check_points(points: tuple[PatchPoint, ...]) -> list[PatchPointState]:
    """Check patch points against the installed vLLM."""
    return [PatchPointState(point, _find_problem(point)) for point in points]


def first_broken(points: tuple[PatchPoint, ...]) -> PatchPointState | None:
    """Return the first patch point that does not fit, or None; later ones are not looked at."""
    for point in points:
        problem = _find_problem(point)
        if problem is not None:
            return PatchPointState(point, problem)
    return None


def group_problem(group: PatchGroup, runner: Runner | None = None) -> str | None:
    """Return why a feature cannot be used with the installed vLLM and how to go on, or None.

    Args:
        group: The feature's.
        runner: The model runner it is to be used on; None: both.
    """
    broken = first_broken(group.points(runner))
    if broken is None:
        return None
    point, feature, remedies = broken.point, group.feature, [group.remedy]
    if runner is not None and point in group.points_of(runner):
        feature += f" on the {runner.upper()} model runner"
        other = int(runner == "v1")
        remedies.append(f"use the other model runner (VLLM_USE_V2_MODEL_RUNNER={other})")
    remedies.append(f"install vLLM {supported_range()} or a newer vllm-vispec")
    return (
        f"{feature}: patch point {point.name} does not fit this vLLM ({broken.problem}); "
        f"{', or '.join(filter(None, remedies))}; see `vispec doctor`"
    )


def require(group: PatchGroup, runner: Runner | None = None) -> None:
    """Refuse a feature whose patch points do not all fit the installed vLLM.

    Args:
        group: The feature's.
        runner: The model runner it is to be used on; None: both.

    Raises:
        ViSpecError: names the feature, the first patch point that does not fit and the remedy.
    """
    problem = group_problem(group, runner)
    if problem is not None:
        raise ViSpecError(problem)


def _find_problem(point: PatchPoint) -> str | None:
    text = read_module(point.module)
    if text is None:
        return f"module {point.module} not found"
    names = find_parameters(text, point.symbol)
    if names is None:
        return f"{point.symbol} not found in {point.module}"
    missing = [name for name in point.parameters if name not in names]
    if missing:
        return f"{point.symbol} has no parameter {missing[0]!r}"
    positions = [names.index(name) for name in point.parameters]
    if positions != sorted(positions):
        return f"{point.symbol} has its parameters in another order"
    return None
