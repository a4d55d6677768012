"""Made-up runs, and the report of one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from vllm_vispec.bench.report import Report, make_report
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
TITLES = {
    "answer": "Answer",
    "environment": "Environment",
    "concurrency": "Speedup against concurrency",
    "image_tokens": "Speedup against image tokens",
    "num_speculative_tokens": "Speedup against K",
    "temperature": "Speedup against temperature",
    "acceptance": "Acceptance per position",
    "tasks": "By task",
    "losses": "Where it loses, and what limits the loss",
    "failures": "Failed and missing cells",
    "cells": "All speedups",
    "costs": "Latency, throughput, memory",
    "definitions": "What the words mean",
    "commands": "Commands",
}
Change = Callable[[CellResult], CellResult | None]


def seconds_per_token(key: CellKey) -> float:
    """Plain needs 0.1 s at any load; drafting is 2x faster at 1 and loses at 16."""
    if key.variant == "plain":
        return 0.1
    gain = {1: 2.0, 4: 1.5, 16: 0.9}[key.concurrency] - 0.1 * (key.num_speculative_tokens - 4)
    return 0.1 / (gain if key.variant == "vispec" else 0.9 * gain)


def request(key: CellKey, repetition: int, sample: int) -> Request:
    noise = 1 + 0.01 * ((repetition + sample) % 3)
    decode = seconds_per_token(key) * (TOKENS - 1) * noise
    chunks = TOKENS - 1 if key.variant == "plain" else 8
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
        spec=None if key.variant == "plain" else spec,
        memory=MemoryFacts(peak_bytes=2**31, kv_blocks=512),
        command=f"vllm serve {key.variant}\nvllm bench serve --max-concurrency {key.concurrency}",
    )


def made_up(
    change: Change = lambda one: one,
    variants: tuple[str, ...] = ("plain", "eagle", "vispec"),
    concurrency: tuple[int, ...] = (1, 4, 16),
    ks: tuple[int, ...] = (2, 4),
    image_tokens: tuple[int, ...] = (-1,),
    temperatures: tuple[float, ...] = (0.0,),
) -> BenchRun:
    keys = [
        CellKey(variant, load, k, temperature, images, "tiny suite")
        for k in ks
        for images in image_tokens
        for temperature in temperatures
        for load in concurrency
        for variant in variants
    ]
    cells = [change(cell(key, repetition)) for repetition in range(2) for key in keys]
    settings = {
        "target": "some/target",
        "head": "some/head",
        "dataset": "tiny suite",
        "variants": list(variants),
        "concurrency": list(concurrency),
        "num_speculative_tokens": list(ks),
        "temperatures": list(temperatures),
        "image_tokens": list(image_tokens),
        "repetitions": 2,
    }
    machine = {"processor": "Some CPU", "packages": {"vllm": "0.32.0"}}
    return BenchRun(1, machine, settings, tuple(one for one in cells if one is not None))


def report(run: BenchRun) -> Report:
    return make_report(run, RESAMPLES)


def sections(run: BenchRun) -> dict[str, str]:
    """Sections of a report as Markdown by their short names, escapes taken out."""
    text = report(run).markdown.replace("\\", "")
    parts = dict(part.split("\n\n", 1) for part in text.split("\n## ")[1:])
    assert list(parts) == list(TITLES.values())
    return {name: parts[title].strip("\n") for name, title in TITLES.items()}


def text_of(run: BenchRun, name: str) -> str:
    """One of them."""
    return sections(run)[name]


def tables_in(text: str) -> list[list[list[str]]]:
    """Tables as rows of cells, the head first."""
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    found = [[row[2:-2].split(" | ") for row in table.splitlines()] for table in tables]
    for table in found:
        assert len({len(row) for row in table}) == 1
        assert all(set(cell) <= set("-:") for cell in table.pop(1))
    return found


def table(run: BenchRun, name: str) -> list[list[str]]:
    """Rows of the first table of a section, without its head."""
    return tables_in(text_of(run, name))[0][1:]


def alt_texts(text: str) -> dict[str, str]:
    """What the pictures of a section say in words, by name."""
    return {name: alt for alt, name in re.findall(r"!\[(.*)\]\(plots/(.*)\.svg\)", text)}


def fail_vispec_at_4(one: CellResult) -> CellResult | None:
    if one.key.variant != "vispec" or one.key.concurrency == 1:
        return one
    if one.key.concurrency == 16:
        return None if one.repetition else one
    return replace(one, requests=(), spec=None, error="server died: out of memory")
