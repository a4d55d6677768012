"""The one page that `vispec verify` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from vllm_vispec.verify.result import (
    ALONE,
    TREE,
    AttentionError,
    Difference,
    EngineResult,
    EngineState,
    Layers,
    Verification,
)

WIDTH = 110
NOTHING = "-"

Row = tuple[str, ...]


def print_page(found: Verification, console: Console | None = None) -> None:
    """Print everything, the verdicts last."""
    console = console or Console(width=WIDTH)
    for title, head, rows in _tables(found):
        if rows:
            table = Table(title=title, title_justify="left", show_header=bool(head))
            for name in head or rows[0]:
                table.add_column(name, overflow="fold")
            for row in rows:
                table.add_row(*row)
            console.print(table)
    for line in _lines(found):
        console.print(line, highlight=False, markup=False)


def _tables(found: Verification) -> Iterator[tuple[str, Row, Sequence[Row]]]:
    """Yield title, head (empty: none) and rows of each table; those without rows are left out."""
    yield "Environment", (), list(_environment(found))
    states = [_state(one.name, one.state) for one in found.engines if one.state is not None]
    rows = [(label, *(state[label] for state in states)) for label in states[0]] if states else []
    yield "Engines", (), rows
    yield (
        "Answers that differ from plain vLLM's, at the first token that does",
        ("", "prompt", "batch", "position", "expected", "found", "gap", ""),
        [_difference(name, one) for name, many in found.differences.items() for one in many],
    )
    yield (
        "Acceptance (vllm:spec_decode_*)",
        ("", "drafts", "acceptance length", "acceptance rate per position"),
        [_acceptance(one) for one in found.engines if one.acceptance is not None],
    )
    yield (
        f"Attention, largest error against an fp32 masked softmax ({found.tolerance:g} is allowed)",
        ("", "backend", "head size", "prompt", "decode", ""),
        [_attention(one) for one in found.attention],
    )
    yield (
        "Decode steps of one request, medians in ms; no verdict",
        ("", "target step", "first draft pass", "draft step", "steps"),
        [_timings(one) for one in found.engines if one.timings],
    )


def _environment(found: Verification) -> Iterator[Row]:
    machine = found.environment
    yield "command", found.command
    yield from machine.get("packages", {}).items()
    yield "python", str(machine.get("python"))
    for gpu in machine.get("gpus") or ["none"]:
        yield "GPU (driver, memory)", gpu
    yield "processor", f"{machine.get('processor')}, {machine.get('cores')} cores"


def _state(name: str, state: EngineState) -> dict[str, str]:
    """Return cells by their labels, the same for every engine."""
    mode = state.compilation
    compiled = [f"{key} {value}" for key, value in mode.items() if key.startswith("num_")]
    graphs = [
        f"{name}: {len(sizes)}, {sizes[0]} to {sizes[-1]} tokens"
        for name, sizes in state.graphs.items()
    ]
    return {
        "": name,
        "device": f"{state.device}, capability {state.capability}",
        "model runner": f"{state.runner}, {state.dtype}",
        "target layers": "\n".join(map(_layers, state.target)) or NOTHING,
        "draft layers": "\n".join(map(_layers, state.draft)) or NOTHING,
        "compilation mode": f"{mode['mode']}, {mode['backend']}",
        "compiled": "\n".join(compiled) or "nothing",
        "cudagraph_mode": state.cudagraph_mode,
        "CUDA graphs": "\n".join(graphs) or "none captured",
    }


def _layers(layers: Layers) -> str:
    padded = layers.padded_size != layers.head_size
    size = f"{layers.head_size} padded to {layers.padded_size}" if padded else layers.head_size
    return f"{layers.count} x {layers.backend}, head size {size}, KV cache {layers.kv_cache_dtype}"


def _difference(feature: str, one: Difference) -> Row:
    gap = NOTHING if one.gap is None else f"{one.gap:.3g}"
    places = str(one.position), str(one.expected), str(one.found)
    return feature, one.prompt, one.batch, *places, gap, "noise" if one.is_noise else "WRONG"


def _acceptance(engine: EngineResult) -> Row:
    found = engine.acceptance
    assert found is not None
    # Behind a tree's levels vLLM has positions that no path reaches.
    rates = [f"{rate:.2f}" for rate in found.rate_per_pos if rate] or ["0.00"]
    return engine.name, str(found.num_drafts), f"{found.acceptance_length:.2f}", " ".join(rates)


def _attention(one: AttentionError) -> Row:
    case = one.case
    what = f"{case.feature}: {'node codes' if case.feature == TREE else 'masked positions'}"
    size = f"{case.head_size} in {one.used_size or case.padded_size}"
    errors = (NOTHING if error is None else f"{error:.1e}" for error in (one.prompt, one.decode))
    note = f"not available: {one.reason}" if one.reason else one.failure or ""
    return what, one.backend, size, *errors, note


def _timings(engine: EngineResult) -> Row:
    found = engine.timings
    names = "target_step", "draft_first_pass", "draft_step"
    cells = (f"{1000 * found[name]:.2f}" if name in found else NOTHING for name in names)
    return engine.name, *cells, f"{found['steps']:g}"


def _lines(found: Verification) -> Iterator[str]:
    for name, answer in found.engines[0].answers.get(ALONE, {}).items():
        if answer.error is not None:
            yield f"left out, plain vLLM does not answer it: {name}: {answer.error}"
    noise = found.noise
    if noise is not None:
        yield (
            f"noise: plain vLLM answers {noise.differing} prompts otherwise alone than together; "
            "the gap in logprob between its two likeliest tokens changes by up to "
            f"{noise.measured:.3g}. Another token than plain vLLM's counts as noise if plain "
            f"vLLM's gap between the two is at most {noise.limit:.3g}, the larger of that change "
            f"and of rounding ({noise.rounding:.3g})."
        )
    for engine in found.engines:
        if engine.error is not None:
            yield f"log of {engine.name}: {engine.log}"
    for verdict in found.verdicts:
        yield f"{verdict.feature}: {verdict.state}{_equal(found, verdict.feature)}"
        yield from (f"  {reason}" for reason in verdict.reasons)


def _equal(found: Verification, feature: str) -> str:
    """Count the feature's answers, if there are any."""
    total = sum(
        len(many) for e in found.engines if e.name == feature for many in e.answers.values()
    )
    if not total:
        return ""
    noise = [one.is_noise for one in found.differences.get(feature, ())]
    counts = total - len(noise), total, sum(noise), len(noise) - sum(noise)
    return " ({} of {} answers equal, {} differ within noise, {} wrong)".format(*counts)
