"""Out of memory in training: which part ran out, over which samples, and what makes it smaller."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from vllm_vispec.utils.errors import ViSpecError, first_line

TARGET, BACKWARD, VALIDATION = "the target", "the backward pass", "validation"
_SMALLER = "batch.size or data.max_length"
# What makes a part smaller; the draft's parts have the same settings.
_REMEDY: Mapping[str, str] = {
    TARGET: f"lower {_SMALLER}, or fill a cache first (teacher.mode offline, teacher.engine vllm)",
    VALIDATION: f"lower {_SMALLER}, or run.num_draft_tokens",
}
_OF_DRAFT = f"lower {_SMALLER}, loss.chunk_rows or loss.passes"
_SHOWN = 8


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the CPU has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextmanager
def part(name: str) -> Iterator[None]:
    """Note the part that runs out of memory inside; the innermost one is told."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            error.add_note(name)
        raise


@contextmanager
def explained(name: str, samples: Mapping[str, int]) -> Iterator[None]:
    """Say in one line what ran out of memory.

    Args:
        name: the part; of the draft in training, the one noted inside is told instead.
        samples: those in work, by name, with their tokens.

    Raises:
        ViSpecError: memory ran out inside.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        inner = getattr(error, "__notes__", [])[:1]
        where = ", ".join([name, *inner] if name in _REMEDY else inner or [name])
        shown = [f"{one} ({count:,} tokens)" for one, count in [*samples.items()][:_SHOWN]]
        more = len(samples) - len(shown)
        raise ViSpecError(
            f"out of memory in {where}, with the samples {', '.join(shown)}"
            + (f" and {more} more" if more else "")
            + f": {_REMEDY.get(name, _OF_DRAFT)}; fragments are avoided by "
            f"PYTORCH_ALLOC_CONF=expandable_segments:True ({first_line(error)})"
        ) from error
