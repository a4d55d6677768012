"""The engine variants that tests run: V1 and V2 runner, installed vLLM and the 0.33 overlay."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

V1_ENV = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
V2_ENV = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}


@dataclass(frozen=True)
class Runner:
    """One variant: its name, the environment of its child process, and whether it is an overlay."""

    name: str
    variables: Mapping[str, str]
    overlay: bool = False

    def env(self) -> dict[str, str]:
        """Return the environment to add (the overlay folder is built on first use)."""
        variables = dict(self.variables)
        if self.overlay:
            folder = overlay_folder()
            variables["PYTHONPATH"] = folder
            # vLLM keeps what it knows of a model class for one release at a time.
            variables["VLLM_CACHE_ROOT"] = f"{folder}-cache"
        return variables


def overlay_folder() -> str:
    """Return the folder of the 0.33 overlay: ``VISPEC_VLLM_OVERLAY`` or a freshly built one."""
    given = os.environ.get("VISPEC_VLLM_OVERLAY")
    if given:
        return given
    from tests.cpu_stack.overlay import build

    return str(build())


RUNNERS: Mapping[str, Runner] = {
    runner.name: runner
    for runner in (
        Runner("v1", V1_ENV),
        Runner("v2", V2_ENV),
        Runner("v1-overlay", V1_ENV, overlay=True),
        Runner("v2-overlay", V2_ENV, overlay=True),
    )
}


def runners(*names: str, slow: Sequence[str] = ()) -> list[pytest.ParameterSet]:
    """Return runners' names as parameters with their markers.

    Those in ``slow`` stay out of the default set, as the overlays do.
    """
    return [pytest.param(name, id=name, marks=marks(name, name in slow)) for name in names]


def marks(name: str, slow: bool = False) -> list[pytest.MarkDecorator]:
    """Return the markers of tests that use the runner ``name``."""
    runner = RUNNERS[name]
    found = [pytest.mark.engine]
    found += [pytest.mark.v2] if runner.variables is V2_ENV else []
    found += [pytest.mark.overlay] if runner.overlay else []
    return [*found, pytest.mark.slow] if slow else found
