"""`vispec regenerate`: the target answers the questions of a data set itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_vispec.cli.options import options_of
from vllm_vispec.data.regenerate.settings import RegenerateSettings, write_questions
from vllm_vispec.data.shards import listed, manifest_of, places
from vllm_vispec.data.tables import is_table, write_out
from vllm_vispec.utils.errors import ViSpecError

if TYPE_CHECKING:
    from vllm_vispec.data.regenerate.job import BackendName, Summary


@options_of(RegenerateSettings)
def regenerate(
    settings: RegenerateSettings,
    question: Annotated[
        list[str] | None, typer.Option(help="To ask about the images of a folder; repeatable.")
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Run as a Ray job, over several machines.")
    ] = False,
) -> None:
    """Let the target answer image questions at length: training data for its draft head."""
    from vllm_vispec.data.regenerate.job import regenerate_all

    if settings.server and ray:
        raise ViSpecError("--server and --ray exclude each other; leave one out")
    backend: BackendName = "processes" if settings.workers > 1 else "offline"
    backend = "server" if settings.server else "ray" if ray else backend
    asked: Path | None = None
    if is_table(settings.input):
        source = write_out(settings.input, settings.beside("table"))
        settings = settings.model_copy(update={"input": source})
    elif settings.input.is_dir():
        asked = write_questions(settings, question or ())
        settings = settings.model_copy(update={"input": asked})
    elif question:
        raise ViSpecError(
            f"--question is for a folder of images, --input {settings.input} is none: drop it"
        )
    try:
        summary = regenerate_all(settings, backend, progress=True)
    except ViSpecError:
        # Without answers there is nothing that they belong to.
        written = (file for file in places(settings.output) if file.is_file())
        if asked and not any(file.stat().st_size for file in written):
            asked.unlink()
        raise
    for line in summary_lines(summary, settings.output):
        typer.echo(line)


def summary_lines(summary: Summary, output: Path) -> list[str]:
    """Return the summary for people; the same counts are beside the output as JSON."""
    lines = [
        f"{summary.total} samples: {summary.success} regenerated, {summary.skipped} there before, "
        f"{summary.error} rejected",
        f"{summary.answers} answers, {summary.answer_tokens} tokens, "
        f"{summary.length} ended by --max-tokens or the context",
    ]
    if shards := listed(output):
        lines.append(
            f"{len(shards)} files, listed in {manifest_of(output)}: {output} means them all"
        )
    lines += [f"  rejected: {count} x {reason}" for reason, count in summary.reasons.most_common()]
    if summary.error:
        lines.append(f"  ids and reasons: {output}.rejected.jsonl")
    if summary.degenerate:
        lines.append(
            f"warning: {summary.degenerate} answers repeat themselves: look at them before you "
            "train; --prompt-style and --max-tokens decide how long the target has to talk"
        )
        lines += [f"  {example}" for example in summary.degenerate_examples]
    if summary.round_trip_failed:
        lines.append(
            f"warning: {summary.round_trip_failed} samples have other tokens in the chat template "
            "than the target generated; training uses the recorded tokens of the last answer"
        )
    if summary.round_trip_unchecked:
        lines.append(
            f"warning: {summary.round_trip_unchecked} samples could not be checked against the "
            "chat template; give --target and a server that returns token ids"
        )
    return lines
