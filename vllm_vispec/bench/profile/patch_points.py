"""Whether this vLLM can be looked into."""

from __future__ import annotations

from vllm_vispec.compat.check import first_broken
from vllm_vispec.compat.groups.profile import PROFILE_POINTS
from vllm_vispec.errors import ViSpecError


def check_profile_points() -> None:
    """Refuse a vLLM that this version of the package cannot look into.

    Raises:
        ViSpecError: names the place.
    """
    broken = first_broken(PROFILE_POINTS)
    if broken is not None:
        raise ViSpecError(
            f"patch point {broken.name} does not fit this vLLM ({broken.detail}): profile with "
            "vLLM 0.32 or 0.33"
        )
