"""`vispec vocab`."""

from __future__ import annotations

import typer

from vllm_vispec.cli.options import options_of
from vllm_vispec.draft_vocab.make import MadeVocab, VocabOptions, make_vocab


@options_of(VocabOptions)
def vocab(options: VocabOptions) -> None:
    """Rank the target's tokens by how often its answers use them, for a smaller draft lm_head."""
    made = make_vocab(options)
    for line in _lines(made, in_head=options.output is None):
        typer.echo(line)


def _lines(made: MadeVocab, in_head: bool) -> list[str]:
    facts = made.facts
    lines = [
        f"{facts['answer_tokens']} tokens of {facts['answers']} answers, "
        f"{facts['distinct_answer_tokens']} of {facts['target_tokens']} tokens occur",
        "tokens   covered   of answers not ranked by",
    ]
    for count, shares in facts["coverage"].items():
        found = ("-" if share is None else f"{share:.2%}" for share in shares.values())
        lines.append("{:>6}   {:>7}   {:>7}".format(count, *found))
    setting = '"auto"' if in_head else f'"{made.file}"'
    return [*lines, f"wrote {made.file}", f'use it with "draft_vocab": {setting}']
