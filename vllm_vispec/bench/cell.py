"""Measuring one cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_vispec.bench.counters import difference, lookups_between
from vllm_vispec.bench.load import LoadError, LoadJob, LoadResult
from vllm_vispec.bench.matrix import MatrixSettings, Visit
from vllm_vispec.bench.questions import QuestionStore
from vllm_vispec.bench.schema import CellResult, MemoryFacts
from vllm_vispec.bench.serving import Group, Server
from vllm_vispec.errors import ViSpecError


class Measure:
    """Puts load on servers and turns what comes back into records.

    Args:
        make_load: `run_load` or a stand-in.
        result: file for the load generator's own result.
    """

    def __init__(
        self,
        settings: MatrixSettings,
        store: QuestionStore,
        make_load: Callable[[LoadJob], LoadResult],
        result: Path,
    ) -> None:
        self._settings, self._store = settings, store
        self._make_load, self._result = make_load, result

    def warm_up(self, visits: Sequence[Visit], server: Server) -> None:
        """Send a few questions of the first cell, so that nothing is compiled in a measured one.

        Raises:
            ViSpecError: no question was answered.
        """
        if not self._settings.warm_up:
            return
        job = self._job(visits[0], server, server, self._settings.warm_up)
        _check(self._make_load(job))

    def cell(self, visit: Visit, group: Group) -> CellResult:
        """Measure a cell; whatever goes wrong is in the result's `error`."""
        commands: list[str] = []
        try:
            server = group.server(visit.key.side)
            commands.append(server.spec.command)
            limit = self._settings.num_questions(visit.key.concurrency)
            job = self._job(visit, server, group.first() or server, limit)
            commands.append(job.command)
            server.forget()
            before, memory_before = server.counters(), server.memory()
            result = self._make_load(job)
            _check(result)
            spec = difference(server.counters(), before)
            memory = lookups_between(server.memory(), memory_before)
        except ViSpecError as error:
            return _failed(visit, commands, str(error))
        return CellResult(
            key=visit.key,
            repetition=visit.repetition,
            requests=result.requests,
            wall_s=round(result.wall_s, 6),
            spec=spec,
            memory=memory,
            command="\n".join(commands),
        )

    def _job(self, visit: Visit, server: Server, helper: Server, limit: int) -> LoadJob:
        """Return the load of a cell; `helper` answers earlier questions of dialogues."""
        key = visit.key
        samples, file = self._store.questions(key.image_tokens, helper, limit)
        return LoadJob(
            url=server.url,
            model=self._settings.target,
            samples=samples,
            questions=file,
            concurrency=key.concurrency,
            temperature=key.temperature,
            result=self._result,
            timeout_s=self._settings.cell_timeout_s,
        )


def _check(result: LoadResult) -> None:
    """Refuse a load in which nothing was answered.

    Raises:
        LoadError: with the first request's reason.
    """
    errors = [request.error for request in result.requests]
    if all(error is not None for error in errors):
        raise LoadError(f"no request was answered: {errors[0] if errors else 'none was sent'}")


def _failed(visit: Visit, commands: Sequence[str], error: str) -> CellResult:
    return CellResult(
        key=visit.key,
        repetition=visit.repetition,
        requests=(),
        wall_s=0.0,
        spec=None,
        memory=MemoryFacts(),
        command="\n".join(commands),
        error=error,
    )
