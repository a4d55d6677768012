"""Checks of single values of a head's configuration; all raise `ViSpecError`."""

from __future__ import annotations

from vllm_vispec.errors import ViSpecError


def require_flag(name: str, value: object) -> None:
    """Refuse what is neither true nor false."""
    if not isinstance(value, bool):
        raise ViSpecError(
            f"{name} of the head is {value!r}, it must be true or false: correct the head's "
            "config.json"
        )


def require_positive_int(name: str, value: object) -> None:
    """Refuse what is no integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ViSpecError(
            f"{name} of the head is {value!r}, it must be an integer of at least 1: correct the "
            "head's config.json or its weights"
        )


def require_positive_number(name: str, value: object) -> None:
    """Refuse what is no number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ViSpecError(
            f"{name} of the head is {value!r}, it must be a positive number: correct the head's "
            "config.json"
        )
