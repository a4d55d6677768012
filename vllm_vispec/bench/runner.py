"""Measuring a matrix: servers side by side, cell by cell, every cell written down as it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from vllm_vispec.bench.checks import check_inputs
from vllm_vispec.bench.environment import describe_conditions
from vllm_vispec.bench.load import LoadError, LoadGenerator, LoadJob, LoadResult
from vllm_vispec.bench.matrix import MatrixSettings, Visit
from vllm_vispec.bench.questions import QuestionStore
from vllm_vispec.bench.run_folder import RunFolder
from vllm_vispec.bench.schema import BenchSample, CellResult, MemoryFacts, SpecCounters
from vllm_vispec.bench.server import BenchServer, ServerSpec, choose_ports
from vllm_vispec.bench.serving import Group, serve_arguments
from vllm_vispec.bench.sides import SIDES, Heads
from vllm_vispec.utils.errors import ViSpecError

NOTHING_DRAFTED = SpecCounters(0, 0, 0, ())


@dataclass(frozen=True)
class Tools:
    """What a run uses of the world outside; tests put stand-ins here."""

    make_server: Callable[[ServerSpec], BenchServer] = BenchServer
    make_load: Callable[[LoadJob], LoadResult] = field(default_factory=LoadGenerator)
    check: Callable[[MatrixSettings], None] = check_inputs
    machine: Callable[[], dict[str, Any]] = describe_conditions
    say: Callable[[str], None] = print


@dataclass(frozen=True)
class Outcome:
    """What a call of `run_matrix` did: cells measured, cells that failed, cells found done."""

    measured: int
    failed: int
    found: int


def run_matrix(
    settings: MatrixSettings,
    samples: Sequence[BenchSample],
    output: Path,
    first_port: int = 0,
    tools: Tools | None = None,
) -> Outcome:
    """Measure what is not yet in the output folder.

    A cell that fails is recorded with its error and the run goes on; a later call tries it again.
    Servers are gone when this returns, also after SIGINT and SIGTERM.

    Args:
        samples: the dataset.
        output: folder of the run; an earlier run of the same settings is continued.
        first_port: of the servers; 0: any that is free.

    Raises:
        ViSpecError: before anything is started: a head or the target cannot be used, a port is in
            use, the dataset is empty, the folder belongs to another run.
        KeyboardInterrupt: on SIGINT and SIGTERM.
    """
    tools = tools or Tools()
    tools.check(settings)
    ports = dict(zip(settings.sides, choose_ports(len(settings.sides), first_port), strict=True))
    store = QuestionStore(settings, samples, output)
    content = {**settings.to_json(), "samples": len(samples), "samples_digest": digest(samples)}
    with interruptible(), RunFolder(output, content, tools.machine()) as folder:
        return _Run(settings, folder, store, ports, tools).all_groups()


@dataclass(frozen=True)
class _Run:
    """One call of `run_matrix`."""

    settings: MatrixSettings
    folder: RunFolder
    store: QuestionStore
    ports: Mapping[str, int]
    tools: Tools

    def all_groups(self) -> Outcome:
        groups = [
            (num_tokens, visits, [visit for visit in visits if visit not in self.folder.done])
            for num_tokens, visits in self.settings.groups()
        ]
        make_load, failed = self.tools.make_load, 0
        with make_load if isinstance(make_load, LoadGenerator) else nullcontext():
            for num_tokens, _, wanted in groups:
                failed += self._group(num_tokens, wanted) if wanted else 0
        total = sum(len(visits) for _, visits, _ in groups)
        to_do = sum(len(wanted) for _, _, wanted in groups)
        return Outcome(to_do - failed, failed, total - to_do)

    def _group(self, num_tokens: int, visits: Sequence[Visit]) -> int:
        """Measure the cells of one K; returns how many failed."""
        there = {visit.key.side for visit in visits}
        sides = [side for side in self.settings.sides if side in there]
        path, settings, tools, failed = self.folder.path, self.settings, self.tools, 0
        heads = Heads(
            settings.target,
            settings.head or "",
            settings.eagle_head or "",
            path / "heads",
            settings.schedule,
        )

        def make(side: str) -> BenchServer:
            arguments = serve_arguments(settings, side, heads, num_tokens, len(sides))
            log_file = path / "logs" / f"{side}-k{num_tokens}.log"
            return tools.make_server(ServerSpec(side, arguments, self.ports[side], log_file))

        def wait(server: BenchServer) -> None:
            server.wait_until_ready(settings.ready_timeout_s)
            # A few questions of the first cell, so that nothing is compiled in a measured one.
            if settings.warm_up:
                self._load(self._job(visits[0], server, server, settings.warm_up))

        tools.say(f"K={num_tokens}: starting {', '.join(sides)}")
        with Group(sides, make, wait) as group:
            for number, visit in enumerate(visits, start=1):
                cell = self._cell(visit, group)
                self.folder.add(cell)
                failed += cell.error is not None
                tools.say(f"  [{number}/{len(visits)}] {describe(visit)}: {state(cell.error)}")
        return failed

    def _cell(self, visit: Visit, group: Group) -> CellResult:
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
                spec=(result.spec or NOTHING_DRAFTED) if speculates else None,
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
            result=self.folder.path / "load.json",
            timeout_s=self.settings.cell_timeout_s,
        )

    def _load(self, job: LoadJob) -> LoadResult:
        """Make a load; one in which nothing was answered is refused.

        Raises:
            LoadError: with the first request's reason.
        """
        result = self.tools.make_load(job)
        errors = [request.error for request in result.requests]
        if None not in errors:
            raise LoadError(f"no request was answered: {errors[0] if errors else 'none was sent'}")
        return result


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM end the block as SIGINT does, so that servers are stopped."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def describe(visit: Visit) -> str:
    """Return a cell in words."""
    key = visit.key
    image = f", {key.image_tokens} image tokens" if key.image_tokens >= 0 else ""
    return (
        f"{key.side}, concurrency {key.concurrency}, temperature {key.temperature:g}{image}, "
        f"repetition {visit.repetition + 1}"
    )


def state(error: str | None) -> str:
    """Return how a cell went, in one line."""
    return "done" if error is None else f"failed: {error.splitlines()[0]}"


def digest(samples: Sequence[BenchSample]) -> str:
    """Return what tells datasets apart: a hash of what is asked, images by their content."""
    found = sha256()
    for sample in samples:
        found.update(repr(replace(sample, turns=())).encode())
        for part in (part for turn in sample.turns for part in turn.parts):
            found.update(part.text.encode() if part.image is None else _content(part.image))
    return found.hexdigest()[:16]


def _content(image: str) -> bytes:
    try:
        return Path(image).read_bytes()
    except OSError:
        # Whoever sends it reports it.
        return image.encode()


def lookups_between(after: MemoryFacts, before: MemoryFacts) -> MemoryFacts:
    """Return the later reading, image lookups counted from the earlier one on."""
    return replace(
        after,
        image_table_hits=_less(after.image_table_hits, before.image_table_hits),
        image_table_misses=_less(after.image_table_misses, before.image_table_misses),
    )


def _less(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before
