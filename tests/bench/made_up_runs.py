"""Made-up runs, and the report of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vllm_vispec.bench.report import make_report, to_markdown
from vllm_vispec.bench.report.blocks import Chapter, Document, Paragraph, Table
from vllm_vispec.bench.report.facts import Facts
from vllm_vispec.bench.report.sections import SECTIONS
from vllm_vispec.bench.schema import (
    BenchRun,
    CellKey,
    CellResult,
    MemoryFacts,
    Request,
    SpecCounters,
)

FAMILIES = ("captioning", "charts")
SAMPLES = 4
TOKENS = 21
RESAMPLES = 40
EVIL = "<script>alert('x')</script> | `tick` **bold** $x_1$ & [a](http://evil.example/)"
Change = Callable[[CellResult], CellResult | None]


def seconds_per_token(key: CellKey) -> float:
    """Plain needs 0.1 s at any load; drafting is 2x faster at 1 and loses at 16."""
    if key.side == "plain":
        return 0.1
    gain = {1: 2.0, 4: 1.5, 16: 0.9}[key.concurrency] - 0.1 * (key.num_speculative_tokens - 4)
    return 0.1 / (gain if key.side == "vispec" else 0.9 * gain)


def request(key: CellKey, repetition: int, sample: int) -> Request:
    noise = 1 + 0.01 * ((repetition + sample) % 3)
    decode = seconds_per_token(key) * (TOKENS - 1) * noise
    chunks = TOKENS - 1 if key.side == "plain" else 8
    return Request(
        sample_id=f"s{sample}",
        family=FAMILIES[sample % 2],
        output_text=f"answer {sample}",
        output_tokens=TOKENS,
        prompt_tokens=100,
        ttft_s=0.5,
        e2e_s=0.5 + decode,
        itl_s=(decode / chunks,) * chunks,
    )


def cell(key: CellKey, repetition: int) -> CellResult:
    k = key.num_speculative_tokens
    accepted = tuple(9 - position for position in range(k))
    spec = SpecCounters(10, 10 * k, sum(accepted), accepted)
    return CellResult(
        key=key,
        repetition=repetition,
        requests=tuple(request(key, repetition, sample) for sample in range(SAMPLES)),
        wall_s=10.0,
        spec=None if key.side == "plain" else spec,
        memory=MemoryFacts(peak_bytes=2**31, kv_blocks=512),
        command=f"vllm serve {key.side}\nvllm bench serve --max-concurrency {key.concurrency}",
    )


def made_up(
    change: Change = lambda one: one,
    sides: tuple[str, ...] = ("plain", "eagle", "vispec"),
    concurrency: tuple[int, ...] = (1, 4, 16),
    ks: tuple[int, ...] = (2, 4),
    image_tokens: tuple[int, ...] = (-1,),
    temperatures: tuple[float, ...] = (0.0,),
) -> BenchRun:
    keys = [
        CellKey(side, load, k, temperature, images, "tiny suite")
        for k in ks
        for images in image_tokens
        for temperature in temperatures
        for load in concurrency
        for side in sides
    ]
    cells = [change(cell(key, repetition)) for repetition in range(2) for key in keys]
    settings = {
        "target": "some/target",
        "head": "some/head",
        "dataset": "tiny suite",
        "sides": list(sides),
        "concurrency": list(concurrency),
        "num_speculative_tokens": list(ks),
        "temperatures": list(temperatures),
        "image_tokens": list(image_tokens),
        "repetitions": 2,
    }
    machine = {"processor": "Some CPU", "packages": {"vllm": "0.32.0"}}
    return BenchRun(1, machine, settings, tuple(one for one in cells if one is not None))


def report(run: BenchRun) -> Document:
    return make_report(run, RESAMPLES)


def chapter(run: BenchRun, name: str) -> Chapter:
    blocks = tuple(SECTIONS[name].build(Facts(run, RESAMPLES)))
    return Chapter(name, SECTIONS[name].title, blocks or (Paragraph(SECTIONS[name].empty),))


def text_of(run: BenchRun, name: str) -> str:
    """A section as Markdown, escapes taken out."""
    return to_markdown(Document("", (chapter(run, name),))).replace("\\", "")


def table(run: BenchRun, name: str) -> Table:
    return next(block for block in chapter(run, name).blocks if isinstance(block, Table))


def fail_vispec_at_4(one: CellResult) -> CellResult | None:
    if one.key.side != "vispec" or one.key.concurrency == 1:
        return one
    if one.key.concurrency == 16:
        return None if one.repetition else one
    return replace(one, requests=(), spec=None, error="server died: out of memory")
