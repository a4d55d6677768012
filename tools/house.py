"""`python -m tools.house`: the size and shape of the repository against its limits.

Prints one table: lines and modules, import circles (type-only imports included), patch points by
feature, the README, and the weight of result data. It ends with status 1 if a limit is exceeded.
Where the repository is not there yet, the ceiling is what it has: it may shrink, but not grow.
Files are those that git tracks, so that build products and caches do not count.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "vllm_vispec"
PRODUCT = (PACKAGE, "benchmarks")
ROOT_MODULES = {"__init__", "__main__", "plugin", "config"}
FOLDERS = (PACKAGE, "benchmarks", "docs", "examples", "tests", "tools")
RESULT_DATA = ("benchmarks/results", "docs/report")


class Measure(NamedTuple):
    """One line of the table.

    Attributes:
        name: What was measured.
        value: How much it is.
        limit: The most that it shall be.
        ceiling: The most that it may be until then; None: the limit.
    """

    name: str
    value: int
    limit: int
    ceiling: int | None = None

    @property
    def is_exceeded(self) -> bool:
        """Whether the value is more than it may be."""
        return self.value > (self.limit if self.ceiling is None else self.ceiling)


def tracked_files(*suffixes: str) -> list[Path]:
    """Return the files that git tracks, relative to the root, with one of the suffixes.

    In a copy without git, all files of our folders.
    """
    command = ["git", "ls-files", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        paths = [Path(name) for name in done.stdout.split("\0") if name]
    else:
        found = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")))
        paths = [path.relative_to(ROOT) for path in found]
    return [p for p in paths if (ROOT / p).is_file() and (not suffixes or p.suffix in suffixes)]


def count_lines(paths: Iterable[Path]) -> int:
    """Return the lines of all files together."""
    return sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in paths)


def module_name(path: Path) -> str:
    """Return the dotted name of a module's file."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports_of(module: str, source: str, known: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules of ours that a module imports at its top level, for types too.

    Imports inside functions run later and make no circle.
    """
    for node in _top_level(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from package import module` names a module; `from module import name` does not.
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            targets = [name if name in known else node.module for name in names]
        else:
            continue
        yield from (target for target in targets if target in known and target != module)


def _top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements that run on import, and those below ``if TYPE_CHECKING``."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            waiting += [child for child in ast.walk(node) if isinstance(child, ast.stmt)][1:]


def find_circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return import circles, one after the other, each opened at its last edge."""
    remaining = {module: set(targets) for module, targets in graph.items()}
    circles = []
    while True:
        try:
            TopologicalSorter(remaining).prepare()
        except CycleError as error:
            circle: list[str] = error.args[1]
            circles.append(circle)
            # graphlib lists a circle against the direction of the edges.
            remaining[circle[1]].discard(circle[0])
        else:
            return circles


def import_circles(paths: Iterable[Path]) -> list[list[str]]:
    """Return the import circles among the files of a package."""
    known = {module_name(path): path for path in paths}
    graph = {
        module: set(imports_of(module, (ROOT / path).read_text(encoding="utf-8"), known))
        for module, path in known.items()
    }
    return find_circles(graph)


def patch_points() -> dict[str, int]:
    """Return how many patch points each feature has on each runner."""
    from vllm_vispec.compat.groups import GROUPS

    return {group.title: len(group.points) for group in GROUPS}


def count_all_patch_points() -> int:
    """Return how many patch points there are, those of several features counted once."""
    from vllm_vispec.compat.groups import unique_points

    return len(unique_points())


def measure_house() -> list[Measure]:
    """Measure everything that has a limit."""
    python = tracked_files(".py")
    product = [path for path in python if path.parts[0] in PRODUCT]
    tests = [path for path in python if path.parts[0] == "tests"]
    loose = [p for p in python if p.parts[:-1] == (PACKAGE,) and p.stem not in ROOT_MODULES]
    points = patch_points()
    core = points.get("core", 0)
    weight = sum(
        (ROOT / path).stat().st_size
        for path in tracked_files()
        if str(path).startswith(RESULT_DATA) and path.suffix != ".md"
    )
    return [
        Measure("lines of vllm_vispec and benchmarks", count_lines(product), 24_000, 38_000),
        Measure("modules of vllm_vispec and benchmarks", len(product), 210, 230),
        Measure("modules loose in vllm_vispec", len(loose), 0),
        Measure("lines of tests", count_lines(tests), 18_000, 33_500),
        Measure("import circles", len(import_circles(product)), 0),
        Measure("patch points: plain chains on V2", core + points.get("chains on V2", 0), 18),
        Measure("patch points: more for chains on V1", points.get("chains on V1", 0), 14),
        Measure("patch points: all", count_all_patch_points(), 75),
        Measure("README, bytes", (ROOT / "README.md").stat().st_size, 10_240),
        Measure("result data, KiB", weight // 1024, 1_536),
    ]


def main() -> int:
    """Print the table; return 1 if something is more than it may be."""
    measures = measure_house()
    table = Table("", "now", "limit", "until then", box=None)
    for one in measures:
        until = "" if one.ceiling is None else f"{one.ceiling:,}"
        style = "bold red" if one.is_exceeded else "yellow" if one.value > one.limit else ""
        table.add_row(one.name, f"{one.value:,}", f"{one.limit:,}", until, style=style)
    console = Console()
    console.print(table)
    console.print("patch points:", ", ".join(f"{n} {name}" for name, n in patch_points().items()))
    for circle in import_circles(p for p in tracked_files(".py") if p.parts[0] in PRODUCT):
        console.print("circle:", " <- ".join(circle), soft_wrap=True)
    return int(any(one.is_exceeded for one in measures))


if __name__ == "__main__":
    sys.exit(main())
