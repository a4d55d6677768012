"""`python -m tools.docs`: write the generated tables of the documentation; `--check` compares them.

A generated table stands between ``<!-- name: ... -->`` and ``<!-- /name -->``.  Its text comes from
the code it describes, so that a page cannot say something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, NamedTuple

import typer

from benchmarks.report import replace_section
from tools import tables
from tools.house import ROOT


class Section(NamedTuple):
    """A generated part of a page.

    Attributes:
        page: The page, relative to the root of the repository.
        name: What its markers are called.
        write: Makes the text between the markers.
    """

    page: str
    name: str
    write: Callable[[], str]


SECTIONS = (
    Section("docs/compatibility.md", "patch-points", tables.patch_points),
    Section("docs/targets.md", "targets", tables.targets),
    Section("docs/glossary.md", "metrics", tables.metrics),
    Section("docs/trees.md", "head-sizes", tables.head_sizes),
    Section("docs/evidence/estimates.md", "speedups", tables.estimated_speedups),
    Section("docs/evidence/estimates.md", "published", tables.published_acceptance),
    Section("docs/evidence/estimates.md", "calibration", tables.calibration),
    Section("docs/evidence/ablation.md", "tables", tables.ablation),
    Section("docs/evidence/compressors.md", "tables", tables.compressors),
    Section("docs/evidence/trees.md", "tables", tables.trees),
    Section("docs/evidence/training.md", "steps", tables.training_step),
)


def broken_links() -> list[str]:
    """Return links of our pages to files that do not exist, as ``page: target``."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    pages += sorted((ROOT / "docs").rglob("*.md"))
    return [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
        if not target.startswith("http") and not (page.parent / target).exists()
    ]


def main(
    check: Annotated[bool, typer.Option("--check", help="Compare only; write nothing.")] = False,
) -> None:
    """Write all generated tables, or say which differ; find links that lead nowhere."""
    problems = [f"broken link: {link}" for link in broken_links()]
    for page, name, write in SECTIONS:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        wanted = replace_section(text, name, write())
        if wanted != text and check:
            problems.append(f"{page}: the table {name} is not current; run python -m tools.docs")
        elif wanted != text:
            path.write_text(wanted, encoding="utf-8")
            typer.echo(f"wrote {name} of {page}")
    for problem in problems:
        typer.echo(problem, err=True)
    raise typer.Exit(1 if problems else 0)


if __name__ == "__main__":
    typer.run(main)
