"""Patch points, places where ViSpec touches vLLM, and the features that need them."""

from dataclasses import dataclass
from typing import Literal

VERSIONS = ("0.32", "0.33")

Runner = Literal["v1", "v2"]


@dataclass(frozen=True)
class PatchPoint:
    """One thing in vLLM that ViSpec calls, overrides or reads.

    Attributes:
        module: Dotted module, e.g. ``vllm.engine.arg_utils``.
        symbol: ``name``, ``Class``, ``Class.method`` or, with ``self.`` inside, an attribute that
            the class must set.
        parameters: Parameters that must exist, in this order, ``self`` left out.  Others may
            follow or stand between.
        use: ``wraps``, ``overrides``, ``subclasses``, ``calls`` or ``reads``.
        reason: Why it is touched.
        versions: vLLM releases it was verified on.
    """

    module: str
    symbol: str
    parameters: tuple[str, ...]
    use: str
    reason: str
    versions: tuple[str, ...] = VERSIONS

    @property
    def name(self) -> str:
        """``module:symbol``, as shown to users."""
        return f"{self.module}:{self.symbol}"


@dataclass(frozen=True)
class PatchGroup:
    """What one feature touches in vLLM.

    Attributes:
        name: Short name, as `vispec doctor` prints it.
        feature: What cannot be used while a patch point of the group is broken.
        remedy: How to go on without the feature.
        common: Patch points that both model runners need.
        v1: Patch points that only the V1 model runner needs.
        v2: Patch points that only the V2 model runner needs.
    """

    name: str
    feature: str
    remedy: str
    common: tuple[PatchPoint, ...] = ()
    v1: tuple[PatchPoint, ...] = ()
    v2: tuple[PatchPoint, ...] = ()

    @property
    def runners(self) -> tuple[Runner | None, ...]:
        """The model runners that are checked apart; None stands for both together."""
        found: tuple[Runner, ...] = ("v2", "v1")
        return tuple(r for r in found if self.points_of(r)) or (None,)

    def points_of(self, runner: Runner) -> tuple[PatchPoint, ...]:
        """Patch points that only this model runner needs."""
        return self.v1 if runner == "v1" else self.v2

    def points(self, runner: Runner | None = None) -> tuple[PatchPoint, ...]:
        """Patch points that must fit on a model runner; None: all of the group."""
        if runner is None:
            return (*self.common, *self.v2, *self.v1)
        return (*self.common, *self.points_of(runner))
