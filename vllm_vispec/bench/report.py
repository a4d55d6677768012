"""`vispec bench report`: a run as Markdown and as one HTML page.

`facts` turns a run into one table of cells. This module says what follows from it, and the
sentences are in `bench/templates/report.md.j2`. The HTML page is that Markdown, rendered, with its
pictures inside.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import floor, isnan
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from vllm_vispec.utils.errors import ViSpecError

try:
    import matplotlib  # noqa: F401
    import pandas as pd
except ImportError as error:
    raise ViSpecError(f"the report needs {error.name}: pip install 'vllm-vispec[bench]'") from error

from vllm_vispec.bench.bootstrap import RESAMPLES
from vllm_vispec.bench.facts import OURS, Facts, families, timed
from vllm_vispec.bench.matrix import find_variant
from vllm_vispec.bench.metrics import METRICS
from vllm_vispec.bench.pages import Chart, escape, to_html, to_markdown
from vllm_vispec.bench.schedules import K_SETTING as K
from vllm_vispec.bench.schedules import best_schedule, speculative_config
from vllm_vispec.bench.schema import IMAGES_AS_THEY_ARE, BenchRun
from vllm_vispec.utils.files import write_text

LATE_FIRST_TOKEN = 1.05


def number(value: float, digits: int = 1) -> str:
    """A number, or a dash."""
    return "-" if isnan(value) else f"{value:.{digits}f}"


def share(value: float) -> str:
    """A share in per cent, rounded down: only all is 100 %."""
    return "-" if isnan(value) else f"{floor(value * 1000) / 10:g} %"


def image_text(tokens: int) -> str:
    """An image-token setting in words."""
    return "as they are" if tokens == IMAGES_AS_THEY_ARE else str(tokens)


def temperature_text(temperature: float) -> str:
    """A temperature in words."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def point_text(row: Any, *free: str) -> str:
    """Where in the matrix a cell lies, without the fields that vary."""
    parts = {
        K: f"K = {row.num_speculative_tokens}",
        "concurrency": f"concurrency {row.concurrency}",
        "temperature": temperature_text(row.temperature),
        "image_tokens": f"image tokens {image_text(row.image_tokens)}",
        "dataset": f"dataset {row.dataset}",
    }
    return ", ".join(text for name, text in parts.items() if name not in free)


def speedups(row: Any) -> Markup:
    """Four cells of a table: no speedup is shown without equality and length beside it.

    Losses and differences are strong; a cell that failed or was not measured says so.
    """
    if not row.done:
        return Markup(f"**{escape(row.state)}** | - | - | -")
    same = "sampled" if row.temperature > 0 else share(row.identical_outputs)
    cells = (
        _strong_if(row.decode_speedup < 1, number(row.decode_speedup, 2) + _interval(row)),
        _strong_if(row.e2e_speedup < 1, number(row.e2e_speedup, 2)),
        _strong_if(row.identical_outputs < 1, same),
        f"{number(row.mean_output_tokens)} / {number(row.plain_length)}",
    )
    return Markup(" | ".join(cells))


AXES: dict[str, tuple[str, str, Callable[[Any], str], str]] = {
    "concurrency": ("concurrency", "concurrency", str, "concurrencies"),
    "image_tokens": (
        "image tokens",
        "image tokens per request",
        image_text,
        "numbers of image tokens",
    ),
    K: ("K", "K", str, "values of K"),
    "temperature": ("temperature", "temperature", temperature_text, "temperatures"),
}
"""Fields of a cell: in the title, at the axis, a value as text, and several of them."""


def answers(facts: Facts) -> dict[str, Any]:
    """Return what the template needs, and the ``charts`` it refers to."""
    axes = {axis: list(_slices(facts, axis)) for axis in AXES}
    acceptance = _acceptance(facts)
    charts = [chart for slices in axes.values() for chart, _ in slices]
    return {
        "charts": (*charts, *([acceptance["chart"]] if acceptance else [])),
        "filters": {
            "number": number,
            "share": share,
            "point": point_text,
            "speedups": speedups,
            "image_text": image_text,
            "temperature_text": temperature_text,
        },
        "run": facts.run,
        "main": facts.main,
        "variant": facts.variant,
        "rows": _rows(facts.table),
        "drafting": _rows(facts.drafting),
        "metrics": METRICS.values(),
        "variants": {
            one: found.summary
            for one in facts.table.variant.unique()
            if (found := find_variant(one)) is not None
        },
        "environment": list(_flat({"machine": facts.run.machine, "settings": facts.run.settings})),
        "commands": list(_commands(facts)),
        "axes": [(axis, *AXES[axis], slices) for axis, slices in axes.items()],
        "acceptance": acceptance,
        **_answer(facts),
        **_losses(facts),
        **_failures(facts),
    }


def _rows(table: pd.DataFrame) -> list[Any]:
    return list(table.itertuples())


def _strong_if(bad: bool, text: str) -> str:
    return f"**{text}**" if bad else text


def _interval(row: Any, prefix: str = "") -> str:
    return "" if isnan(row.low) else f" ({prefix}{row.low:.2f} to {row.high:.2f})"


def _answer(facts: Facts) -> dict[str, Any]:
    """How fast, how sure, with which K, up to which load, and on which tasks."""
    row = facts.main
    if row is None:
        return {}
    by_k = timed(facts.like(row, K)).set_index(K).decode_speedup
    loads = timed(facts.like(row, "concurrency")).set_index("concurrency").decode_speedup
    losing = loads.index[loads < 1]
    variants, names = timed(facts.like(row, "variant")), families(row)
    return {
        "speed": f"{row.decode_speedup:.2f}x{_interval(row, '95 %: ')}",
        "noise": row.low <= 1 <= row.high,
        "by_k": by_k,
        "loads": loads,
        "losing_load": None if losing.empty else losing[0],
        "gaining_loads": loads.index if losing.empty else loads.index[loads.index < losing[0]],
        "tasks": {name: _rows(facts.of_family(variants, name)) for name in names if any(names)},
    }


def _slices(facts: Facts, axis: str) -> Iterator[tuple[Chart, list[Any]]]:
    """decode_speedup against one axis, the others held, for every temperature and dataset."""
    if facts.main is None:
        return
    _, label, text, _ = AXES[axis]
    names = [name for name in ("dataset", "temperature") if name != axis]
    count = 0
    for _, rows in facts.like(facts.main, "variant", axis, *names).groupby(names):
        measured = timed(rows)
        if measured[axis].nunique() < 2:
            continue
        count += 1
        order = "images" if axis == "image_tokens" else axis
        chart = Chart(
            f"speedup_{axis}" + (f"_{count}" if count > 1 else ""),
            point_text(_rows(rows)[0], axis),
            label,
            "decode_speedup over plain vLLM",
            measured.assign(x=measured[axis].map(text), y=measured.decode_speedup),
            list(dict.fromkeys(rows.sort_values(order)[axis].map(text))),
            facts.variant,
        )
        yield chart, _rows(rows)


def _acceptance(facts: Facts) -> dict[str, Any]:
    """What steps accept, a line per variant at the point the report leads with."""
    rows = facts.drafting[:0] if facts.main is None else facts.like(facts.main, "variant")
    rows = rows[rows.acceptance_rate_per_position.map(bool, na_action="ignore").eq(True)]
    if rows.empty:
        return {}
    depth = int(rows.acceptance_rate_per_position.map(len).max())
    points = rows.assign(y=rows.acceptance_rate_per_position, low=None, high=None).explode("y")
    points["x"] = (points.groupby("variant").cumcount() + 1).astype(str)
    chart = Chart(
        "acceptance_by_position",
        point_text(facts.main),
        "position of the draft token",
        "share of steps that accept it",
        points.astype({"y": float, "low": float, "high": float}),
        [str(place) for place in range(1, depth + 1)],
        facts.variant,
        shares=True,
    )
    padded = rows.acceptance_rate_per_position.map(
        lambda found: (*found, *[float("nan")] * depth)[:depth]
    )
    return {"chart": chart, "rows": _rows(rows.assign(acceptance_rate_per_position=padded))}


def _losses(facts: Facts) -> dict[str, Any]:
    """Cells below 1.0, the schedule of K that avoids them, and other losses."""
    rows = timed(facts.drafting[facts.drafting.variant == facts.variant])
    losing = _rows(rows[(rows.decode_speedup < 1) | (rows.e2e_speedup < 1)])
    late = rows[rows.ttft_ratio > LATE_FIRST_TOKEN].sort_values("ttft_ratio", kind="stable")
    different = rows[rows.identical_outputs < 1].sort_values("identical_outputs", kind="stable")
    return {
        "measured": len(rows),
        "lowest": next(rows.sort_values("decode_speedup", kind="stable").itertuples(), None),
        "losing": [(row, _limit(facts, row)) for row in losing],
        "config": _config(facts, losing[0]) if losing else None,
        "late": _rows(late),
        "different": _rows(different),
        "failing": _rows(rows[rows.failed_requests > 0]),
    }


def _limit(facts: Facts, row: Any) -> str:
    """What other K do at the same point."""
    found = timed(facts.like(row, K)).set_index(K).decode_speedup
    best = found.idxmax()
    if found[best] <= 1:
        return "K = 0 at this load: no K that was measured gains"
    if best == row.num_speculative_tokens:
        return "fewer requests at once, or longer answers: decoding gains, the prefill takes more"
    return f"K = {best} at this load, with {found[best]:.2f}"


def _config(facts: Facts, row: Any) -> str | None:
    """The setting with each concurrency's fastest K; None if none gains."""
    rows = timed(facts.like(row, K, "concurrency"))
    schedule = best_schedule(
        {
            load: dict(zip(group[K].tolist(), group.decode_speedup, strict=True))
            for load, group in rows.groupby("concurrency")
        }
    )
    settings = facts.run.settings
    head = {"model": settings.get("head") or "HEAD"} if facts.variant == OURS else {}
    head |= settings.get("speculative_config") or {} if head else {}
    config = speculative_config({"method": facts.variant, **head}, schedule)
    return f"--speculative-config '{json.dumps(config)}'" if config else None


def _failures(facts: Facts) -> dict[str, Any]:
    """What failed, and what was asked for and not measured."""
    failed, missing, flawed = [], dict[str, list[str]](), []
    for row in facts.table.itertuples():
        failed += [(row, cell) for cell in row.cells if cell.error is not None]
        if row.failed_requests > 0:
            errors = [one.error for cell in row.cells for one in cell.requests if one.error]
            flawed.append((row, next(iter(errors), None)))
        if len(row.cells) < row.expected:
            there = {cell.repetition for cell in row.cells}
            gone = ", ".join(str(i + 1) for i in range(row.expected) if i not in there)
            # One line for all rows that lack the same repetitions: an unfinished run has many.
            missing.setdefault(gone, []).append(str(row.Index))
    return {"failed": failed, "missing": missing, "flawed": flawed}


def _commands(facts: Facts) -> Iterator[tuple[Any, str, str]]:
    """The commands of every row; repetitions only where theirs differ."""
    for row in facts.table.itertuples():
        for command in dict.fromkeys(cell.command for cell in row.cells if cell.command):
            same = [str(cell.repetition + 1) for cell in row.cells if cell.command == command]
            yield row, command, "" if len(same) == len(row.cells) else ", ".join(same)


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of nested data, names joined by dots; empty groups have no line."""
    for name, value in content.items():
        if isinstance(value, Mapping) and (value or not prefix):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield f"{prefix}{name}", text


@dataclass(frozen=True)
class Report:
    """A report as Markdown, which refers to its pictures as `plots/NAME.svg`.

    Attributes:
        pictures: SVG by NAME.
    """

    markdown: str
    pictures: Mapping[str, str]

    @property
    def html(self) -> str:
        """The same as one page, complete in itself."""
        return to_html(self.markdown, self.pictures)


class ReportFiles(NamedTuple):
    """Where a report was written: the page, and Markdown with its pictures beside it."""

    html: Path
    markdown: Path
    plots: list[Path]


def make_report(run: BenchRun, resamples: int = RESAMPLES) -> Report:
    """Return the report of a run; equal runs give equal reports.

    Args:
        resamples: of every interval.
    """
    context = answers(Facts.from_run(run, resamples))
    charts = {chart.name: chart.draw() for chart in context["charts"]}
    return Report(to_markdown("report.md.j2", **context), charts)


def write_report(results: Path, output: Path, resamples: int = RESAMPLES) -> ReportFiles:
    """Turn a run into `report.html`, `report.md` and `plots/*.svg`.

    Args:
        results: folder of a run, or its JSON file.
        output: folder to write to; files of an earlier report are replaced.
        resamples: of every interval.

    Raises:
        ViSpecError: the run cannot be read, or the folder cannot be written.
    """
    report = make_report(BenchRun.load(results), resamples)
    plots = {output / "plots" / f"{name}.svg": svg for name, svg in report.pictures.items()}
    files = ReportFiles(output / "report.html", output / "report.md", list(plots))
    for path, text in {**plots, files.markdown: report.markdown, files.html: report.html}.items():
        write_text(path, text)
    return files
