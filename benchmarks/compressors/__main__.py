"""Train and measure heads with every compressor: `python -m benchmarks.compressors`.

Run it again to go on after a stop; `--step` and `--variant` do a part.
"""

from __future__ import annotations

from typing import Any

import typer

from benchmarks.answers import ask_all
from benchmarks.compressors import SCALING, VARIANTS
from benchmarks.compressors.findings import look_at_held_out, read_findings
from benchmarks.compressors.page import draw, to_markdown
from benchmarks.study import Study, study_command


def measure(study: Study) -> None:
    """Ask the engine; with the first seed also replay, and ask the gates."""
    ask_all(study)
    look_at_held_out(study)


def report(study: Study) -> dict[str, Any]:
    """Return the JSON's content."""
    settings = study.settings() | {"scaling": SCALING}
    return {"settings": settings, "rows": read_findings(study)}


main = study_command("compressors", VARIANTS, (0,), measure, report, to_markdown, draw)

if __name__ == "__main__":
    typer.run(main)
