"""Whether this vLLM can be looked into."""

from __future__ import annotations

from vllm_vispec.errors import ViSpecError
from vllm_vispec.seam_table_profile import PROFILE_SEAMS
from vllm_vispec.seams import first_broken


def check_profile_seams() -> None:
    """Refuse a vLLM that this version of the package cannot look into.

    Raises:
        ViSpecError: names the place.
    """
    broken = first_broken(PROFILE_SEAMS)
    if broken is not None:
        raise ViSpecError(
            f"seam {broken.name} does not fit this vLLM ({broken.detail}): profile with vLLM 0.32 "
            "or 0.33"
        )
