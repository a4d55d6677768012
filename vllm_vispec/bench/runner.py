"""Measuring a matrix: servers beside each other, every cell written down as it ends."""

from __future__ import annotations

import fcntl
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from vllm_vispec.bench.heads import check_has_adaptor
from vllm_vispec.bench.load import LoadError, LoadGenerator, LoadJob, LoadResult
from vllm_vispec.bench.machine import describe_conditions
from vllm_vispec.bench.matrix import AXES, LATE, MatrixSettings, Repetition, different_settings
from vllm_vispec.bench.questions import QuestionStore
from vllm_vispec.bench.schema import (
    CELLS_FILE,
    FORMAT,
    RUN_FILE,
    BenchRun,
    BenchSample,
    CellResult,
    MemoryFacts,
    SpecCounters,
)
from vllm_vispec.bench.server import (
    BenchServer,
    ServerGroup,
    ServerSpec,
    choose_ports,
    serve_arguments,
)
from vllm_vispec.bench.variants import VARIANTS, Heads
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import write_text
from vllm_vispec.utils.process import interruptible

PACKAGES = {"vllm": "vllm", "pandas": "pandas (vllm[bench])"}
NOTHING_DRAFTED = SpecCounters(0, 0, 0, ())


def check_inputs(settings: MatrixSettings) -> None:
    """Refuse what would let a run fail after minutes.

    Raises:
        ViSpecError: a package is missing, or the target or a head is not there or not usable.
    """
    from vllm_vispec.heads.folder import inspect_head

    for module, name in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise ViSpecError(f"vllm bench serve needs {name}: install it here")
    _check_folder("--target", settings.target)
    needed = {option for name in settings.sides for option in VARIANTS[name].needs}
    if "--head" in needed and settings.head:
        inspect_head(settings.head)
        if "vispec_zeroed" in settings.sides:
            check_has_adaptor(settings.head)
    if "--eagle-head" in needed and settings.eagle_head:
        _check_folder("--eagle-head", settings.eagle_head)


def _check_folder(flag: str, name: str) -> None:
    """Refuse a path to nothing; hub ids are left to vLLM."""
    path = Path(name).expanduser()
    looks_like_path = path.is_absolute() or name.startswith(("./", "../", "~")) or path.exists()
    if looks_like_path and not (path / "config.json").is_file():
        raise ViSpecError(f"{flag} {name} has no config.json: give a model's folder or hub id")
    if not looks_like_path and name.count("/") > 1:
        raise ViSpecError(f"{flag} {name} does not exist: give a model's folder or hub id")


@dataclass(frozen=True)
class Tools:
    """What a run uses of the world outside; tests put stand-ins here."""

    make_server: Callable[[ServerSpec], BenchServer] = BenchServer
    make_load: Callable[[LoadJob], LoadResult] = field(default_factory=LoadGenerator)
    check: Callable[[MatrixSettings], None] = check_inputs
    machine: Callable[[], dict[str, Any]] = describe_conditions
    log: Callable[[str], None] = print


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
        return _Run(settings, folder, store, ports, tools).measure()


@dataclass(frozen=True)
class _Run:
    """One call of `run_matrix`."""

    settings: MatrixSettings
    folder: RunFolder
    store: QuestionStore
    ports: Mapping[str, int]
    tools: Tools

    def measure(self) -> Outcome:
        make_load, done = self.tools.make_load, self.folder.done.copy()
        found = to_do = failed = 0
        with make_load if isinstance(make_load, LoadGenerator) else nullcontext():
            for num_tokens, repetitions in self.settings.groups():
                wanted = [one for one in repetitions if one not in done]
                found, to_do = found + len(repetitions) - len(wanted), to_do + len(wanted)
                failed += self._measure_group(num_tokens, wanted) if wanted else 0
        return Outcome(to_do - failed, failed, found)

    def _measure_group(self, num_tokens: int, wanted: Sequence[Repetition]) -> int:
        """Measure the cells of one K; returns how many failed."""
        there = {key.side for key, _ in wanted}
        variants = [name for name in self.settings.sides if name in there]
        path, settings, tools, failed = self.folder.path, self.settings, self.tools, 0
        heads = Heads(
            settings.target,
            settings.head or "",
            settings.eagle_head or "",
            path / "heads",
            settings.schedule,
        )

        def make(name: str) -> BenchServer:
            arguments = serve_arguments(settings, name, heads, num_tokens, len(variants))
            log_file = path / "logs" / f"{name}-k{num_tokens}.log"
            return tools.make_server(ServerSpec(name, arguments, self.ports[name], log_file))

        def wait(server: BenchServer) -> None:
            server.wait_until_ready(settings.ready_timeout_s)
            # A few questions of the first cell, so that nothing is compiled in a measured one.
            if settings.warm_up:
                self._load(self._job(wanted[0], server, server, settings.warm_up))

        tools.log(f"K={num_tokens}: starting {', '.join(variants)}")
        with ServerGroup(variants, make, wait) as group:
            for number, repetition in enumerate(wanted, start=1):
                cell = self._measure_cell(repetition, group)
                self.folder.add(cell)
                failed += cell.error is not None
                state = "done" if cell.error is None else f"failed: {cell.error.splitlines()[0]}"
                tools.log(f"  [{number}/{len(wanted)}] {describe(repetition)}: {state}")
        return failed

    def _measure_cell(self, repetition: Repetition, group: ServerGroup) -> CellResult:
        """Measure a cell; whatever goes wrong is in the result's `error`."""
        commands: list[str] = []
        key, number = repetition
        cell = CellResult(key, number, (), 0.0, None, MemoryFacts(), "")
        try:
            server = group.server(key.side)
            commands.append(server.spec.command)
            limit = self.settings.num_questions(key.concurrency)
            job = self._job(repetition, server, group.first() or server, limit)
            commands.append(job.command)
            server.reset_caches()
            before = server.memory()
            result = self._load(job)
            speculates = VARIANTS[key.side].draft is not None
            return replace(
                cell,
                requests=result.requests,
                wall_s=round(result.wall_s, 6),
                spec=(result.spec or NOTHING_DRAFTED) if speculates else None,
                memory=server.memory().since(before),
                command="\n".join(commands),
            )
        except ViSpecError as error:
            return replace(cell, command="\n".join(commands), error=str(error))

    def _job(
        self, repetition: Repetition, server: BenchServer, helper: BenchServer, limit: int
    ) -> LoadJob:
        """Return the load of a cell; `helper` answers earlier questions of dialogues."""
        key, _ = repetition
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


def describe(repetition: Repetition) -> str:
    """Return one measurement in words."""
    key, number = repetition
    image = f", {key.image_tokens} image tokens" if key.image_tokens >= 0 else ""
    return (
        f"{key.side}, concurrency {key.concurrency}, temperature {key.temperature:g}{image}, "
        f"repetition {number + 1}"
    )


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


class RunFolder:
    """Appends cells to a run. Use it as a context manager.

    Attributes:
        path: the folder.
        done: repetitions that are there without an error.

    Raises:
        ViSpecError: the folder belongs to other settings or another running benchmark, is damaged,
            or cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        self.path = path
        self.done: set[Repetition] = set()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._cells = (path / CELLS_FILE).open("ab")
        except OSError as error:
            raise ViSpecError(
                f"--output {path} cannot be written ({error.strerror or error}): choose another "
                "folder"
            ) from error
        try:
            fcntl.flock(self._cells, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check_run_file(settings, machine)
        except BaseException as error:
            self._cells.close()
            if not isinstance(error, BlockingIOError):
                raise
            raise ViSpecError(
                f"--output {path} is in use by another benchmark: choose another folder"
            ) from error

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        # Gives the lock back.
        self._cells.close()

    def add(self, cell: CellResult) -> None:
        """Append a measured cell, failed or not."""
        line = json.dumps(cell.to_json(), ensure_ascii=False) + "\n"
        self._cells.write(line.encode("utf-8", "replace"))
        self._cells.flush()
        if cell.error is None:
            self.done.add((cell.key, cell.repetition))

    def _check_run_file(self, settings: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        """Compare with an earlier call, note which cells are there, write what covers both."""
        file = self.path / RUN_FILE
        if file.exists():
            earlier = BenchRun.load(self.path)
            name = different_settings(earlier.settings, settings)
            if name is not None:
                raise ViSpecError(
                    f"--output {self.path} was measured with {name} "
                    f"{earlier.settings.get(name)!r}, now it is {settings[name]!r}: choose another "
                    "folder or the earlier setting"
                )
            settings, machine = _widened(earlier.settings, settings), earlier.machine
            self.done = {
                (cell.key, cell.repetition) for cell in earlier.cells if cell.error is None
            }
        content = {"format": FORMAT, "machine": dict(machine), "settings": dict(settings)}
        write_text(file, json.dumps(content, indent=2) + "\n")
        # A last line that was cut off is measured again.
        self._cells.truncate((self.path / CELLS_FILE).read_bytes().rfind(b"\n") + 1)


def _widened(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that cover what both calls asked for."""
    axes = {name: list(dict.fromkeys([*earlier[name], *now[name]])) for name in AXES}
    late = {name: now.get(name) or earlier.get(name) for name in LATE}
    repetitions = max(earlier["repetitions"], now["repetitions"])
    return {**earlier, **axes, **late, "repetitions": repetitions}
