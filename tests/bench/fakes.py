"""Stand-ins for servers and the load generator, and small settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from examples.tiny_vlm.shipped import CHECKPOINTS
from vllm_vispec.bench.load import LoadGenerator, LoadJob, LoadResult
from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.runner import Tools
from vllm_vispec.bench.schema import BenchSample, MemoryFacts, Request, SpecCounters
from vllm_vispec.bench.server import BenchServer
from vllm_vispec.data.types import Part, Turn
from vllm_vispec.utils.errors import ViSpecError

TARGET, HEAD = CHECKPOINTS / "target", CHECKPOINTS / "vispec_head"
SETTINGS = MatrixSettings(
    target=str(TARGET), head=str(HEAD), repetitions=1, warm_up=0, serve_args=("--seed", "1")
)
SAMPLES = tuple(
    BenchSample(f"s{number}", "words", (Turn("user", (Part(f"question {number}"),)),), 8)
    for number in range(3)
)


def answer(sample: BenchSample) -> Request:
    """Return a made-up answer."""
    return Request(
        sample_id=sample.sample_id,
        family=sample.family,
        output_text=f"answer to {sample.sample_id}",
        output_tokens=4,
        prompt_tokens=9,
        ttft_s=0.1,
        e2e_s=0.4,
        itl_s=(0.1, 0.2),
    )


@dataclass
class World:
    """Everything outside of a run.

    Attributes:
        events: what happened, in order.
        broken: variants whose servers never become ready.
        accepted: draft tokens accepted in every step, of K.
        answers: text of an answer, by variant and sample; None: that of `answer`.
        on_load: called with every job before it is answered; may raise.
    """

    events: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    accepted: int = 1
    answers: Callable[[str, BenchSample], str] | None = None
    on_load: Callable[[LoadJob], None] = lambda job: None
    servers: dict[str, FakeServer] = field(default_factory=dict)

    def tools(self) -> Tools:
        """Return them for `run_matrix`."""
        return Tools(self.make_server, FakeLoads(self), self.events.append)

    def make_server(self, *given: Any) -> FakeServer:
        """Stand in for `BenchServer`."""
        server = FakeServer(*given)
        server.world = self
        self.servers[server.url] = server
        return server

    def make_load(self, job: LoadJob) -> LoadResult:
        """Stand in for a load."""
        server = self.servers[job.url]
        assert [one.variant for one in self.up()].count(server.variant) == 1
        self.events.append(f"load {server.variant} {len(job.samples)}")
        self.on_load(job)
        steps = 2 * len(job.samples)
        server.steps += steps
        requests = [answer(sample) for sample in job.samples]
        if self.answers is not None:
            texts = [self.answers(server.variant, sample) for sample in job.samples]
            pairs = zip(requests, texts, strict=True)
            requests = [replace(request, output_text=text) for request, text in pairs]
        accepted, refused = self.accepted, 4 - self.accepted
        positions = (steps,) * accepted + (0,) * refused
        spec = SpecCounters(steps, 4 * steps, accepted * steps, positions)
        speculates = "--speculative-config" in server.arguments
        return LoadResult(tuple(requests), 0.5, spec if speculates else None)

    def up(self) -> list[FakeServer]:
        """Servers that run now."""
        return [server for server in self.servers.values() if server.alive]

    def loads(self) -> list[str]:
        """Loads in order."""
        return [event for event in self.events if event.startswith("load ")]


class FakeLoads(LoadGenerator):
    """The loads of a world."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __call__(self, job: LoadJob) -> LoadResult:
        return self._world.make_load(job)


class FakeServer(BenchServer):
    """A server that counts two steps a question, of which each accepts the world's number.

    Every step looks an image up; the first one of a question does not find it.
    """

    world: World
    steps = 0
    is_up = False

    @property
    def url(self) -> str:
        return f"http://{self.variant}:{self.port}"

    @property
    def alive(self) -> bool:
        return self.is_up

    def start(self) -> None:
        self.world.events.append(f"start {self.variant}")
        self.is_up = True

    def wait_until_ready(self, seconds: float = 0.0) -> None:
        if self.variant in self.world.broken:
            raise ViSpecError(f"server of {self.variant} ended: no such thing")

    def reset_caches(self) -> None:
        self.world.events.append(f"reset {self.variant}")

    def memory(self) -> MemoryFacts:
        if not self.alive:
            raise ViSpecError(f"server of {self.variant} does not answer")
        if "vispec" not in self.variant:
            return MemoryFacts(peak_bytes=1000, kv_blocks=10)
        return MemoryFacts(1000, 10, self.steps, self.steps // 2)

    def stop(self) -> None:
        if self.is_up:
            self.world.events.append(f"stop {self.variant}")
        self.is_up = False


def lines(file: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]
