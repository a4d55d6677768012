"""`vispec regenerate`: the target answers the questions of a data set itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_vispec.cli.options import exit_on_error, json_object
from vllm_vispec.data.regenerate.picture_folder import write_questions
from vllm_vispec.data.regenerate.prompts import PROMPT_STYLES
from vllm_vispec.data.regenerate.settings import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_TEMPERATURE,
    RegenerateSettings,
    Sampling,
)
from vllm_vispec.utils.errors import ViSpecError

if TYPE_CHECKING:
    from vllm_vispec.data.regenerate.job import Summary

STYLES = ", ".join(PROMPT_STYLES)


def regenerate(
    input_file: Annotated[
        Path,
        typer.Option(
            "--input", help="JSON lines or a JSON array, LLaVA or OpenAI style; or an image folder."
        ),
    ],
    output: Annotated[Path, typer.Option(help="JSON lines file; an earlier run is continued.")],
    question: Annotated[
        list[str] | None, typer.Option(help="To ask about the images of a folder; repeatable.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="Folder or hub id of the target; optional with --server.")
    ] = "",
    image_root: Annotated[
        Path | None, typer.Option(help="Where image paths start; default: the input's folder.")
    ] = None,
    prompt_style: Annotated[str, typer.Option(help=f"Added to questions: {STYLES}.")] = "long",
    prompt_text: Annotated[str, typer.Option(help="Your own words instead of a style.")] = "",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = DEFAULT_TEMPERATURE,
    top_p: Annotated[float, typer.Option(help="Nucleus of the sampling.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Per answer.")] = DEFAULT_MAX_TOKENS,
    seed: Annotated[int, typer.Option(help="With a sample's id it gives the sample's seed.")] = 0,
    strict: Annotated[
        bool, typer.Option(help="Reject answers whose text has other tokens in the template.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="The engine's dtype.")] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt plus answer; default: the target's.")
    ] = None,
    engine: Annotated[str, typer.Option(help="JSON object of further vllm.LLM settings.")] = "{}",
    server: Annotated[str, typer.Option(help="URL of a running vllm serve instead.")] = "",
    concurrency: Annotated[int, typer.Option(help="Open requests to the server.")] = 32,
    ray: Annotated[bool, typer.Option("--ray", help="Run as a Ray job.")] = False,
    workers: Annotated[int, typer.Option(help="Engines of the Ray job.")] = 1,
) -> None:
    """Let the target answer image questions at length: training data for its draft head."""
    from vllm_vispec.data.regenerate.job import regenerate_all

    with exit_on_error():
        settings = RegenerateSettings(
            target=target,
            input=conversation_file(input_file, output, question or []),
            output=output,
            image_root=image_root,
            prompt_style=prompt_style,
            prompt_text=prompt_text,
            sampling=Sampling(temperature, top_p, max_tokens, seed),
            strict=strict,
            dtype=dtype,
            max_model_len=max_model_len,
            engine=json_object("--engine", engine),
            server=server,
            concurrency=concurrency,
            workers=workers,
        )
        summary = regenerate_all(settings, backend_name(server, ray), progress=True)
    for line in summary_lines(summary, output):
        typer.echo(line)


def conversation_file(source: Path, output: Path, questions: list[str]) -> Path:
    """Return the conversations to answer; for a folder of images they are written first.

    Raises:
        ViSpecError: questions for a file that has its own, or a folder without images.
    """
    if source.is_dir():
        return write_questions(source, output, questions)
    if questions:
        raise ViSpecError(
            f"--question is for a folder of images, --input {source} is none: drop it"
        )
    return source


def backend_name(server: str, ray: bool) -> str:
    """Return the backend that the options ask for.

    Raises:
        ViSpecError: they ask for two.
    """
    if server and ray:
        raise ViSpecError("--server and --ray exclude each other; leave one out")
    chosen = {"server": bool(server), "ray": ray, "offline": True}
    return next(name for name, wanted in chosen.items() if wanted)


def summary_lines(summary: Summary, output: Path) -> list[str]:
    """Return the summary for people; the same counts are beside the output as JSON."""
    lines = [
        f"{summary.total} samples: {summary.success} regenerated, {summary.skipped} there before, "
        f"{summary.error} rejected",
        f"{summary.answers} answers, {summary.answer_tokens} tokens, "
        f"{summary.length} ended by --max-tokens or the context",
    ]
    lines += [f"  rejected: {count} x {reason}" for reason, count in summary.reasons.most_common()]
    if summary.error:
        lines.append(f"  ids and reasons: {output}.rejected.jsonl")
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
