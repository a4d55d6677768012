"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.support.child import Child
from tests.support.engine import Engine, EngineOptions, Engines, StartEngine, StartProcess
from tests.support.runners import environment
from tests.support.tiny_store import KIND, TinyStore


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyStore:
    """Tiny targets and heads, built once per session."""
    return TinyStore(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """Child processes with engines, which all tests of this session share."""
    found = Engines()
    yield found
    found.close()


@pytest.fixture(scope="session")
def engine(engines: Engines, tiny: TinyStore) -> StartEngine:
    """Return ``engine(runner, **options)``: a vLLM engine in a child process, ready to be asked.

    ``options`` are those of :class:`EngineOptions` and vLLM's own; the model is the tiny target of
    family ``kind`` unless given. Equal engines are one and stay for later tests. ``env`` adds to
    the process's environment; ``process`` names one apart, for what changes vLLM itself.
    """

    def make(
        runner: str,
        kind: str = KIND,
        env: Mapping[str, str] | None = None,
        process: str = "",
        **options: Any,
    ) -> Engine:
        options = {"model": str(tiny.target(kind)), **options}
        variables = environment(runner) | dict(env or {})
        return engines.engine(variables, process, EngineOptions.of(**options), kind)

    return make


@pytest.fixture(scope="session")
def child(engines: Engines) -> StartProcess:
    """Return ``child(runner, env, process)``: the process itself, for functions without engine."""

    def make(runner: str, env: Mapping[str, str] | None = None, process: str = "") -> Child:
        return engines.child(environment(runner) | dict(env or {}), process)

    return make
