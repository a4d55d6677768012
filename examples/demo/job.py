"""What a comparison's parent and its engine processes say to each other, as JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from examples.pair import Pair


@dataclass(frozen=True)
class Job:
    """One engine and the held-out samples it will be asked about.

    Attributes:
        model: Target folder or hub id.
        draft_model: Draft folder or hub id, None for plain vLLM.
        per_family: Samples of every task family.
        families: Task families, empty for all.
    """

    model: str
    draft_model: str | None = None
    num_speculative_tokens: int = 5
    dtype: str = "float32"
    max_tokens: int = 256
    max_model_len: int = 1024
    per_family: int = 2
    families: tuple[str, ...] = ()

    @classmethod
    def of_pair(
        cls, pair: Pair, *, dtype: str, max_tokens: int, per_family: int, families: Sequence[str]
    ) -> Job:
        """Return the job of serving a pair, from a program's options."""
        return cls(
            model=pair.model,
            draft_model=pair.draft_model,
            num_speculative_tokens=pair.num_speculative_tokens,
            dtype=dtype,
            max_tokens=max_tokens,
            per_family=per_family,
            families=tuple(families),
        )

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Job:
        """Read what :meth:`to_json` wrote."""
        return cls(**(fields | {"families": tuple(fields["families"])}))

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)

    def llm_kwargs(self) -> dict[str, Any]:
        """Return keyword arguments for ``vllm.LLM``.

        Nothing is cached between requests, so that repeating one measures the same work.
        """
        kwargs: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "seed": 0,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": self.max_model_len,
            "max_num_seqs": 4,
            "gpu_memory_utilization": 0.4,
            "enable_prefix_caching": False,
            "mm_processor_cache_gb": 0,
            "disable_log_stats": False,
        }
        if self.draft_model is not None:
            kwargs["per_request_spec_decode_metrics"] = "detailed"
            kwargs["speculative_config"] = {
                "method": "vispec",
                "model": self.draft_model,
                "num_speculative_tokens": self.num_speculative_tokens,
                # Every step is shown.
                "adaptive": False,
            }
        return kwargs


@dataclass(frozen=True)
class Answer:
    """One finished request.

    Attributes:
        token_ids: Generated ids.
        pieces: The text each id added; joined they are the answer.
        per_step_accepted: Accepted draft tokens of every decode step.
        decode_seconds: Time from the first to the last token, in the engine.
        wall_seconds: Time of the whole call, image preprocessing included.
    """

    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    per_step_accepted: tuple[int, ...]
    decode_seconds: float
    wall_seconds: float

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Answer:
        """Read what ``asdict`` and JSON made of an answer."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return cls(**values)

    @property
    def text(self) -> str:
        """The answer without special tokens."""
        return "".join(self.pieces)

    @property
    def ttft_seconds(self) -> float:
        """Time to the first token, image preprocessing included."""
        return self.wall_seconds - self.decode_seconds

    @property
    def num_decoded(self) -> int:
        """Tokens after the first one, which comes out of the prefill."""
        return len(self.token_ids) - 1

    def steps(self) -> list[int | None]:
        """Return, for every token, the step it was drafted in, None for the target's own."""
        origin: list[int | None] = [None]
        for number, accepted in enumerate(self.per_step_accepted, start=1):
            origin += [number] * accepted + [None]
        origin += [None] * len(self.token_ids)
        return origin[: len(self.token_ids)]
