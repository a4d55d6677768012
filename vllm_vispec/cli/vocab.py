"""`vispec vocab`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_vispec.cli.options import exit_on_error

if TYPE_CHECKING:
    from vllm_vispec.draft_vocab.make import MadeVocab


def vocab(
    data: Annotated[
        Path, typer.Option(help="Answers of the target, e.g. the output of `vispec regenerate`.")
    ],
    target: Annotated[str, typer.Option(help="Folder or hub id of the target.")],
    head: Annotated[str, typer.Option(help="Folder or hub id of the head.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to; default: the head's.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Tokens of the list; default: 32768, or all.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier list.")] = False,
) -> None:
    """Rank the target's tokens by how often its answers use them, for a smaller draft lm_head."""
    from vllm_vispec.draft_vocab.make import VocabOptions, make_vocab

    with exit_on_error():
        made = make_vocab(VocabOptions(target, head, data, output, size, overwrite))
    for line in _lines(made, in_head=output is None):
        typer.echo(line)


def _lines(made: MadeVocab, in_head: bool) -> list[str]:
    facts = made.facts
    lines = [
        f"{facts['answer_tokens']} tokens of {facts['answers']} answers, "
        f"{facts['distinct_answer_tokens']} of {facts['target_tokens']} tokens occur",
        "tokens   covered   of answers not ranked by",
    ]
    for count, shares in facts["coverage"].items():
        found = ("-" if one is None else f"{one:.2%}" for one in shares.values())
        lines.append("{:>6}   {:>7}   {:>7}".format(count, *found))
    setting = '"auto"' if in_head else f'"{made.file}"'
    return [*lines, f"wrote {made.file}", f'use it with "draft_vocab": {setting}']
