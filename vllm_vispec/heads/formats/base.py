"""What a dialect is, and the registry of all of them.

A dialect is the way somebody's training code writes a ViSpec head: a table of key templates that
maps its tensor names to ours, a function that turns its config.json into a `HeadConfig`, and a
function that recognises it. To add one, write a module like `reference.py` and import it in
`heads/__init__.py` and list it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.utils.errors import ViSpecError

Shapes = Mapping[str, tuple[int, ...]]
RawConfig = Mapping[str, Any]


def _no_writer(head: HeadConfig, dtype: str) -> dict[str, Any]:
    raise ViSpecError("heads of this dialect are only read: write the canonical dialect")


@dataclass(frozen=True)
class Dialect:
    """One layout of config.json and tensor names.

    Attributes:
        name: as logged and as given in errors.
        summary: one line for users.
        keys: templates "their name" -> "our name"; a trailing `*` stands for the rest of the name.
            The first template that matches wins.
        detect: says whether a folder with this config.json and these tensors is of the dialect.
        head_config: makes the `HeadConfig`; raises `ViSpecError` on values that cannot be.
        ignored: patterns of tensor names that carry nothing we need.
        switched_off: canonical names that may be present although the flags do not use them.
        write_config: makes the config.json of a head, given the dtype of its weights.
        fixed: flags of `HeadConfig` that every head of the dialect has.
    """

    name: str
    summary: str
    keys: Mapping[str, str]
    detect: Callable[[RawConfig, Shapes], bool]
    head_config: Callable[[RawConfig, Shapes], HeadConfig]
    write_config: Callable[[HeadConfig, str], dict[str, Any]] = field(default=_no_writer)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    switched_off: tuple[str, ...] = ()

    def canonical_name(self, source_name: str) -> str | None:
        """Our name of a tensor, or None if the dialect does not know it."""
        for template, ours in self.keys.items():
            if template == source_name:
                return ours
            if template.endswith("*") and source_name.startswith(template[:-1]):
                return ours[:-1] + source_name[len(template) - 1 :]
        return None

    def source_name(self, canonical_name: str) -> str:
        """Their name of one of our tensors."""
        for template, ours in self.keys.items():
            if ours == canonical_name:
                return template
            if ours.endswith("*") and canonical_name.startswith(ours[:-1]):
                return template[:-1] + canonical_name[len(ours) - 1 :]
        return canonical_name

    def check_expressible(self, head: HeadConfig) -> None:
        """Refuse to write a head of a kind that the dialect does not know.

        Raises:
            ViSpecError: names the flag.
        """
        for name, value in self.fixed.items():
            if getattr(head, name) != value:
                raise ViSpecError(
                    f"the {self.name} dialect knows only heads with {name}={value}, this one has "
                    f"{name}={getattr(head, name)}: write it in the canonical dialect"
                )

    def is_ignored(self, source_name: str) -> bool:
        """Whether a tensor is known and of no use."""
        return any(fnmatchcase(source_name, pattern) for pattern in self.ignored)


DIALECTS: dict[str, Dialect] = {}


def register_dialect(dialect: Dialect) -> Dialect:
    """Add a dialect. Detection asks in the order of registration.

    Raises:
        ViSpecError: the name is taken.
    """
    if dialect.name in DIALECTS:
        raise ViSpecError(f"dialect {dialect.name!r} is registered already: choose another name")
    DIALECTS[dialect.name] = dialect
    return dialect


def get_dialect(name: str) -> Dialect:
    """Look a dialect up by name.

    Raises:
        ViSpecError: there is none of that name; lists the known ones.
    """
    if name not in DIALECTS:
        raise ViSpecError(f"unknown dialect {name!r}: use one of {', '.join(DIALECTS)}")
    return DIALECTS[name]
