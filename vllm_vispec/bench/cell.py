"""Measuring one cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_vispec.bench.load import LoadError, LoadJob, LoadResult
from vllm_vispec.bench.matrix import MatrixSettings, Visit
from vllm_vispec.bench.questions import QuestionStore
from vllm_vispec.bench.schema import CellResult, MemoryFacts, SpecCounters
from vllm_vispec.bench.server import BenchServer
from vllm_vispec.bench.serving import Group
from vllm_vispec.bench.sides import SIDES
from vllm_vispec.errors import ViSpecError

NOTHING_DRAFTED = SpecCounters(0, 0, 0, ())


@dataclass(frozen=True)
class Measure:
    """Puts load on servers and turns what comes back into records.

    Attributes:
        make_load: a `LoadGenerator` or a stand-in.
        result: file for the load generator's own result.
    """

    settings: MatrixSettings
    store: QuestionStore
    make_load: Callable[[LoadJob], LoadResult]
    result: Path

    def warm_up(self, visits: Sequence[Visit], server: BenchServer) -> None:
        """Send a few questions of the first cell, so that nothing is compiled in a measured one.

        Raises:
            ViSpecError: no question was answered.
        """
        if self.settings.warm_up:
            self._load(self._job(visits[0], server, server, self.settings.warm_up))

    def cell(self, visit: Visit, group: Group) -> CellResult:
        """Measure a cell; whatever goes wrong is in the result's `error`."""
        commands: list[str] = []
        cell = CellResult(visit.key, visit.repetition, (), 0.0, None, MemoryFacts(), "")
        try:
            server = group.server(visit.key.side)
            commands.append(server.spec.command)
            limit = self.settings.num_questions(visit.key.concurrency)
            job = self._job(visit, server, group.first() or server, limit)
            commands.append(job.command)
            server.forget()
            before = server.memory()
            result = self._load(job)
            speculates = SIDES[visit.key.side].draft is not None
            return replace(
                cell,
                requests=result.requests,
                wall_s=round(result.wall_s, 6),
                spec=result.spec or NOTHING_DRAFTED if speculates else None,
                memory=lookups_between(server.memory(), before),
                command="\n".join(commands),
            )
        except ViSpecError as error:
            return replace(cell, command="\n".join(commands), error=str(error))

    def _job(self, visit: Visit, server: BenchServer, helper: BenchServer, limit: int) -> LoadJob:
        """Return the load of a cell; `helper` answers earlier questions of dialogues."""
        key = visit.key
        samples, file = self.store.questions(key.image_tokens, helper, limit)
        return LoadJob(
            url=server.url,
            model=self.settings.target,
            samples=samples,
            questions=file,
            concurrency=key.concurrency,
            temperature=key.temperature,
            result=self.result,
            timeout_s=self.settings.cell_timeout_s,
        )

    def _load(self, job: LoadJob) -> LoadResult:
        """Make a load; one in which nothing was answered is refused.

        Raises:
            LoadError: with the first request's reason.
        """
        result = self.make_load(job)
        errors = [request.error for request in result.requests]
        if None not in errors:
            raise LoadError(f"no request was answered: {errors[0] if errors else 'none was sent'}")
        return result


def lookups_between(after: MemoryFacts, before: MemoryFacts) -> MemoryFacts:
    """Return the later reading, image lookups counted from the earlier one on."""
    return replace(
        after,
        image_table_hits=_less(after.image_table_hits, before.image_table_hits),
        image_table_misses=_less(after.image_table_misses, before.image_table_misses),
    )


def _less(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before
