"""Checks vLLM's version when the plugin loads, and the patch points of a feature when it is used.

Patch points are compared with vLLM's *source text*: nothing is imported, and only the modules that
a group names are read.  A check of what plain V2 chains need takes about 15 ms.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint, Symbol
from vllm_vispec.compat.source import find_parameters, read_module
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

MIN_VERSION, MAX_VERSION = (0, 32), (0, 33)


def installed_version() -> str:
    """Return vLLM's version, e.g. ``0.33.0``."""
    from vllm.version import __version__

    return str(__version__)


def supported_range() -> str:
    """Return the vLLM versions this release was tested with, e.g. ``0.32 to 0.33``."""
    low, high = (".".join(map(str, version)) for version in (MIN_VERSION, MAX_VERSION))
    return f"{low} to {high}"


def version_problem(version: str) -> str | None:
    """Refuse a vLLM that is too old, warn about one that is too new."""
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        logger.warning(
            "ViSpec: cannot read vLLM's version %r; only patch points are checked", version
        )
        return None
    if (major, minor) < MIN_VERSION:
        return f"vLLM {version} is too old; install vLLM {supported_range()}"
    if (major, minor) > MAX_VERSION:
        logger.warning(
            "ViSpec was tested with vLLM %s, this is %s; its patch points are checked when used",
            supported_range(),
            version,
        )
    return None


@dataclass(frozen=True)
class PatchPointState:
    """What a check found.

    Attributes:
        point: What was checked.
        problem: What does not fit, None if it fits.
        symbol: The definition that does not fit, ``module:symbol``; of a fit, the whole point.
    """

    point: PatchPoint
    problem: str | None
    symbol: str

    @property
    def ok(self) -> bool:
        """Whether the patch point fits."""
        return self.problem is None


def check_points(points: Iterable[PatchPoint]) -> list[PatchPointState]:
    """Check patch points against the installed vLLM."""
    return [_check_point(point) for point in points]


def first_broken(points: Iterable[PatchPoint]) -> PatchPointState | None:
    """Return the first patch point that does not fit, or None; later ones are not looked at."""
    return next((state for state in map(_check_point, points) if not state.ok), None)


def group_problem(group: PatchGroup) -> str | None:
    """Return why a feature cannot be used with the installed vLLM and how to go on, or None."""
    broken = first_broken(group.points)
    if broken is None:
        return None
    feature, remedies = group.feature, [group.remedy]
    if group.runner is not None:
        feature += f" on the {group.runner.upper()} model runner"
        other = int(group.runner == "v1")
        remedies.append(f"use the other model runner (VLLM_USE_V2_MODEL_RUNNER={other})")
    remedies.append(f"install vLLM {supported_range()} or a newer vllm-vispec")
    return (
        f"{feature}: patch point {broken.symbol} does not fit this vLLM ({broken.problem}); "
        f"{', or '.join(filter(None, remedies))}; see `vispec doctor`"
    )


def require(group: PatchGroup) -> None:
    """Refuse a feature whose patch points do not all fit the installed vLLM.

    Raises:
        ViSpecError: names the feature, the first patch point that does not fit and the remedy.
    """
    problem = group_problem(group)
    if problem is not None:
        raise ViSpecError(problem)


def _check_point(point: PatchPoint) -> PatchPointState:
    text = read_module(point.module)
    if text is None:
        return PatchPointState(point, f"module {point.module} not found", point.name)
    for symbol in point.symbols:
        problem = _symbol_problem(text, point.module, symbol)
        if problem is not None:
            return PatchPointState(point, problem, f"{point.module}:{symbol.name}")
    return PatchPointState(point, None, point.name)


def _symbol_problem(text: str, module: str, symbol: Symbol) -> str | None:
    names = find_parameters(text, symbol.name)
    if names is None:
        return f"{symbol.name} not found in {module}"
    missing = [name for name in symbol.parameters if name not in names]
    if missing:
        return f"{symbol.name} has no parameter {missing[0]!r}"
    positions = [names.index(name) for name in symbol.parameters]
    if positions != sorted(positions):
        return f"{symbol.name} has its parameters in another order"
    return None
