"""Patch points, the private places of vLLM that ViSpec relies on, and the features that need them.

A patch point is something that ViSpec wraps, overrides, subclasses, calls or reads although vLLM
does not promise to keep it.  What vLLM offers to everyone (registries, ``Attention``, ``LLM``,
command-line options) is none.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

Runner = Literal["v1", "v2"]

_PLACE = re.compile(
    r"(?P<module>[\w.]+):(?P<owner>[\w.]+)(?:\((?P<parameters>.*)\)|\{(?P<members>.*)\})?"
)
_MEMBER = re.compile(r"([\w.]+)(?:\(([\w, ]*)\))?(?:, |$)")


@dataclass(frozen=True)
class Symbol:
    """One definition in vLLM's source.

    Attributes:
        name: ``name``, ``Class``, ``Class.method`` or, with ``self.`` inside, an attribute that the
            class must set.
        parameters: Parameters that must exist, in this order, ``self`` left out.  Others may
            follow or stand between.
    """

    name: str
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class PatchPoint:
    """One place in vLLM that ViSpec relies on.

    Attributes:
        use: ``wraps``, ``overrides``, ``subclasses``, ``calls`` or ``reads``.
        place: ``module:symbol``, a function's with the parameters that matter, e.g.
            ``vllm.a.b:Class.method(first, second)``.  Members of one class that are used together
            stand in braces: ``vllm.a.b:Class{field, self.attribute, method(first)}``.
        reason: Why.
    """

    use: str
    place: str
    reason: str

    @cached_property
    def _parts(self) -> dict[str, str | None]:
        found = _PLACE.fullmatch(self.place)
        assert found is not None, self.place
        return found.groupdict()

    @property
    def module(self) -> str:
        """Dotted name of vLLM's module."""
        return str(self._parts["module"])

    @cached_property
    def symbols(self) -> tuple[Symbol, ...]:
        """What the module must define."""
        owner, members = self._parts["owner"], self._parts["members"]
        if members is None:
            return (Symbol(str(owner), _names(self._parts["parameters"])),)
        found = _MEMBER.findall(members)
        return tuple(Symbol(f"{owner}.{name}", _names(given)) for name, given in found)

    @property
    def name(self) -> str:
        """``module:symbol``, as shown to users."""
        return re.sub(r"\([^)]*\)", "", self.place)


wraps = partial(PatchPoint, "wraps")
overrides = partial(PatchPoint, "overrides")
subclasses = partial(PatchPoint, "subclasses")
calls = partial(PatchPoint, "calls")
reads = partial(PatchPoint, "reads")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(text.split(", ")) if text else ()


def _never(vllm_config: Any) -> bool:
    return False


def no_patches() -> None:
    """Patches nothing: most features only rely on what vLLM has."""


@dataclass(frozen=True)
class PatchGroup:
    """What one feature relies on in vLLM, on one model runner or on both.

    Attributes:
        name: Short name, as `vispec doctor` prints it.
        feature: What cannot be used while a patch point of the group is broken.
        remedy: How to go on without the feature.
        points: Its patch points.
        runner: The model runner that the group is for; None: both.
        is_needed: Whether an engine with a ViSpec head needs the feature, by its `VllmConfig`.
        apply: Patches vLLM's classes in a worker whose engine needs the feature; called any number
            of times.
    """

    name: str
    feature: str
    remedy: str
    points: tuple[PatchPoint, ...]
    runner: Runner | None = None
    is_needed: Callable[[Any], bool] = _never
    apply: Callable[[], None] = no_patches

    @property
    def title(self) -> str:
        """The name with the model runner."""
        return self.name if self.runner is None else f"{self.name} on {self.runner.upper()}"
