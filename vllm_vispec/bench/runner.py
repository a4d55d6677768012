"""Measuring a matrix: servers beside each other, every cell written down as it ends."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from vllm_vispec.bench.heads import check_has_adaptor
from vllm_vispec.bench.load import LoadGenerator, LoadJob
from vllm_vispec.bench.machine import describe_conditions
from vllm_vispec.bench.matrix import AXES, POINT_AXES, MatrixSettings, Repetition, find_variant
from vllm_vispec.bench.metrics import BASELINE
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
from vllm_vispec.bench.server import BenchServer, ServerGroup, choose_ports, serve_arguments
from vllm_vispec.draft_model.named import check_draft
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import lock, write_json
from vllm_vispec.utils.process import interruptible

LATE = ("schedule", "sibling")
"""Settings that a later call may add or leave out, but not change."""
NOTHING_DRAFTED = SpecCounters(0, 0, 0, ())


@dataclass(frozen=True)
class Tools:
    """What a run uses of the world outside; tests put stand-ins here."""

    make_server: Callable[[str, tuple[str, ...], int, Path], BenchServer] = BenchServer
    loads: LoadGenerator = field(default_factory=LoadGenerator)
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
    check_inputs(settings)
    found = choose_ports(len(settings.variants), first_port)
    ports = dict(zip(settings.variants, found, strict=True))
    store = QuestionStore(settings, samples, output)
    content = {**settings.to_json(), "samples": len(samples), "samples_digest": digest(samples)}
    with interruptible(), open_run(output, content) as folder:
        return _Run(settings, folder, store, ports, tools or Tools()).measure()


def check_inputs(settings: MatrixSettings) -> None:
    """Refuse what would let a run fail after minutes.

    Raises:
        ViSpecError: pandas is missing, or the target or a head is not there or not usable.
    """
    if importlib.util.find_spec("pandas") is None:
        raise ViSpecError("vllm bench serve needs pandas: pip install 'vllm-vispec[bench]'")
    found = [one for one in map(find_variant, settings.variants) if one is not None]
    needed = {name for variant in found for name in variant.needs}
    _check_folder("--target", settings.target)
    for name in needed & {"head", "sibling"}:
        check_draft(getattr(settings, name), settings.target)
    if "vispec_zeroed" in settings.variants:
        check_has_adaptor(settings.head or "")
    if "eagle_head" in needed:
        _check_folder("--eagle-head", settings.eagle_head or "")


def _check_folder(flag: str, name: str) -> None:
    """Refuse a path to nothing; hub ids are left to vLLM."""
    path = Path(name).expanduser()
    is_path = path.exists() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    if is_path and not (path / "config.json").is_file():
        raise ViSpecError(f"{flag} {name} has no config.json: give a model's folder or hub id")


@dataclass(frozen=True)
class _Run:
    """One call of `run_matrix`."""

    settings: MatrixSettings
    folder: RunFolder
    store: QuestionStore
    ports: Mapping[str, int]
    tools: Tools

    def measure(self) -> Outcome:
        done, found, to_do, failed = self.folder.done.copy(), 0, 0, 0
        with self.tools.loads:
            for num_tokens, repetitions in self.settings.groups():
                wanted = [one for one in repetitions if one not in done]
                found, to_do = found + len(repetitions) - len(wanted), to_do + len(wanted)
                failed += self._measure_group(num_tokens, wanted) if wanted else 0
        return Outcome(to_do - failed, failed, found)

    def _measure_group(self, num_tokens: int, wanted: Sequence[Repetition]) -> int:
        """Measure the cells of one K; returns how many failed."""
        there = {key.variant for key, _ in wanted}
        variants = [name for name in self.settings.variants if name in there]
        path, log, failed = self.folder.path, self.tools.log, 0

        def make(name: str) -> BenchServer:
            arguments = serve_arguments(
                self.settings, name, path / "heads", num_tokens, len(variants)
            )
            log_file = path / "logs" / f"{name}-k{num_tokens}.log"
            return self.tools.make_server(name, arguments, self.ports[name], log_file)

        def wait(server: BenchServer) -> None:
            server.wait_until_ready()
            # A few questions of the first cell, so that nothing is compiled in a measured one.
            if self.settings.warm_up:
                self.tools.loads(self._job(wanted[0], server, self.settings.warm_up))

        log(f"K={num_tokens}: starting {', '.join(variants)}")
        with ServerGroup({name: make(name) for name in variants}, wait) as group:
            for number, repetition in enumerate(wanted, start=1):
                cell = self._measure_cell(repetition, group)
                self.folder.add(cell)
                failed += cell.error is not None
                state = "done" if cell.error is None else f"failed: {cell.error.splitlines()[0]}"
                log(f"  [{number}/{len(wanted)}] {describe(repetition)}: {state}")
        return failed

    def _measure_cell(self, repetition: Repetition, group: ServerGroup) -> CellResult:
        """Measure a cell; whatever goes wrong is in the result's `error`."""
        commands: list[str] = []
        key, number = repetition
        cell = CellResult(key, number, (), 0.0, None, MemoryFacts(), "")
        try:
            server = group.server(key.variant)
            commands.append(server.command)
            job = self._job(repetition, server, self.settings.num_questions(key.concurrency))
            commands.append(job.command)
            server.reset_caches()
            before = server.memory()
            result = self.tools.loads(job)
            return replace(
                cell,
                requests=result.requests,
                wall_s=round(result.wall_s, 6),
                spec=None if key.variant == BASELINE else result.spec or NOTHING_DRAFTED,
                memory=server.memory().since(before),
                command="\n".join(commands),
            )
        except ViSpecError as error:
            return replace(cell, command="\n".join(commands), error=str(error))

    def _job(self, repetition: Repetition, server: BenchServer, limit: int) -> LoadJob:
        """Return the load of a cell; the server gives the answers that its dialogues lack."""
        key, _ = repetition
        samples, file = self.store.questions(key.image_tokens, server, limit)
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


def describe(repetition: Repetition) -> str:
    """Return one measurement in words."""
    key, number = repetition
    image = f", {key.image_tokens} image tokens" if key.image_tokens >= 0 else ""
    return (
        f"{key.variant}, concurrency {key.concurrency}, temperature {key.temperature:g}{image}, "
        f"repetition {number + 1}"
    )


def digest(samples: Sequence[BenchSample]) -> str:
    """Return what tells datasets apart: a hash of what is asked, images by their content."""
    found = sha256()
    for sample in samples:
        found.update(repr(replace(sample, turns=())).encode())
        for part in (part for turn in sample.turns for part in turn.parts):
            is_file = part.image is not None and Path(part.image).is_file()
            text = part.text if part.image is None else part.image
            found.update(Path(text).read_bytes() if is_file else text.encode())
    return found.hexdigest()[:16]


@contextmanager
def open_run(path: Path, settings: Mapping[str, Any]) -> Iterator[RunFolder]:
    """Open a run's folder; inside no other benchmark can.

    Raises:
        ViSpecError: the folder belongs to other settings or another running benchmark, is damaged,
            or cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        cells = (path / CELLS_FILE).open("ab")
    except OSError as error:
        raise ViSpecError(
            f"--output {path} cannot be written ({error.strerror or error}): choose another folder"
        ) from error
    with cells:
        lock(cells, f"--output {path} is in use by another benchmark: choose another folder")
        yield RunFolder(path, cells, settings)


class RunFolder:
    """Appends cells to a run.

    Attributes:
        path: the folder.
        done: repetitions that are there without an error.
    """

    def __init__(self, path: Path, cells: IO[bytes], settings: Mapping[str, Any]) -> None:
        """Compare with an earlier call, note which cells are there, write what covers both."""
        self.path, self._cells = path, cells
        self.done: set[Repetition] = set()
        file, machine = path / RUN_FILE, describe_conditions()
        if file.exists():
            earlier = BenchRun.load(path)
            settings, machine = self._covering(earlier.settings, settings), dict(earlier.machine)
            self.done = {(one.key, one.repetition) for one in earlier.cells if one.error is None}
        write_json(file, {"format": FORMAT, "machine": machine, "settings": settings})
        # A last line that was cut off is measured again.
        cells.truncate((path / CELLS_FILE).read_bytes().rfind(b"\n") + 1)

    def add(self, cell: CellResult) -> None:
        """Append a measured cell, failed or not."""
        line = json.dumps(cell.to_json(), ensure_ascii=False) + "\n"
        self._cells.write(line.encode("utf-8", "replace"))
        self._cells.flush()

    def _covering(self, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings that cover what an earlier call and this one asked for.

        Raises:
            ViSpecError: a setting differs that they must share.
        """
        shared = [name for name in now if name not in (*AXES, *LATE, "repetitions")]
        shared += [name for name in LATE if now[name] and earlier.get(name)]
        changed = [name for name in shared if earlier.get(name) != now[name]]
        if now["design"] == "star":
            # The other axes were varied around their first values.
            changed += [name for name in POINT_AXES.values() if earlier[name][0] != now[name][0]]
        if changed:
            name = changed[0]
            raise ViSpecError(
                f"--output {self.path} was measured with {name} {earlier.get(name)!r}, now it is "
                f"{now[name]!r}: choose another folder or the earlier setting"
            )
        axes = {name: list(dict.fromkeys([*earlier[name], *now[name]])) for name in AXES}
        late = {name: now[name] or earlier.get(name) for name in LATE}
        repetitions = max(earlier["repetitions"], now["repetitions"])
        return {**earlier, **axes, **late, "repetitions": repetitions}
