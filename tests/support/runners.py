"""The engine variants that tests run: V1 and V2 runner, installed vLLM and the 0.33 overlay."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

V1_ENV = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
V2_ENV = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
RUNNERS = ("v1", "v2", "v1-overlay", "v2-overlay")


def environment(runner: str) -> dict[str, str]:
    """Return what a child process adds to its environment (the overlay is built on first use)."""
    variables = dict(V1_ENV if runner.startswith("v1") else V2_ENV)
    if runner.endswith("overlay"):
        folder = overlay_folder()
        # vLLM keeps what it knows of a model class for one release at a time.
        variables |= {"PYTHONPATH": folder, "VLLM_CACHE_ROOT": f"{folder}-cache"}
    return variables


def overlay_folder() -> str:
    """Return the folder of the 0.33 overlay: ``VISPEC_VLLM_OVERLAY`` or a freshly built one."""
    given = os.environ.get("VISPEC_VLLM_OVERLAY")
    if given:
        return given
    from tests.cpu_stack.overlay import build

    return str(build())


def runners(*names: str, slow: Sequence[str] = ()) -> list[pytest.ParameterSet]:
    """Return runners' names as parameters with their markers.

    Those in ``slow`` stay out of the default set, as the overlays do.
    """
    return [pytest.param(name, id=name, marks=marks(name, name in slow)) for name in names]


def marks(name: str, slow: bool = False) -> list[pytest.MarkDecorator]:
    """Return the markers of tests that use the runner ``name``."""
    found = [pytest.mark.engine]
    found += [pytest.mark.v2] if name.startswith("v2") else []
    found += [pytest.mark.overlay] if name.endswith("overlay") else []
    return [*found, pytest.mark.slow] if slow else found
