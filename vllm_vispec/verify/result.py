"""What `vispec verify` writes down as JSON; times in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_vispec.bench.schema import Record

SCHEMA_VERSION = 1
PASSED, FAILED, REFUSED = "passed", "failed", "refused"
PLAIN, CHAIN, TREE = "plain", "chain", "tree"
ALONE, TOGETHER = "alone", "together"
BATCHES = (ALONE, TOGETHER)


@dataclass(frozen=True)
class Layers(Record):
    """Attention layers that are alike; sizes and heads are those of one worker.

    Attributes:
        padded_size: head size in the KV cache.
        kv_cache_dtype: the setting, and what the cache's tensor holds.
    """

    count: int
    backend: str
    head_size: int
    padded_size: int
    num_heads: int
    num_kv_heads: int
    kv_cache_dtype: str


@dataclass(frozen=True)
class EngineState(Record):
    """What a running engine is made of, in vLLM's names, as its first worker sees it.

    Attributes:
        compilation: mode, backend and what `compilation_counter` counted.
        graphs: numbers of tokens of the CUDA graphs that were captured, by what replays them.
    """

    runner: str
    device_type: str
    device: str
    capability: str
    dtype: str
    target: tuple[Layers, ...]
    draft: tuple[Layers, ...]
    compilation: dict[str, Any]
    cudagraph_mode: str
    graphs: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Answer(Record):
    """One greedy answer.

    Attributes:
        top: plain vLLM's likeliest tokens at each position, with their logprobs.
        error: why there is none.
    """

    token_ids: tuple[int, ...] = ()
    top: tuple[dict[int, float], ...] = ()
    error: str | None = None


Answers = dict[str, dict[str, Answer]]
"""By batch, `ALONE` or `TOGETHER`, and the prompt's name."""


@dataclass(frozen=True)
class Noise(Record):
    """How far plain vLLM differs from itself.

    Attributes:
        measured: largest change, from batch to batch, of the gap in logprob between the two
            likeliest tokens.
        rounding: two rounding steps of a logit of 16 in the target's dtype.
        differing: prompts that are answered otherwise alone than together.
    """

    measured: float
    rounding: float
    differing: int

    @property
    def limit(self) -> float:
        """The largest gap that still counts as noise."""
        return max(self.measured, self.rounding)


@dataclass(frozen=True)
class Difference(Record):
    """The first token of an answer that is not plain vLLM's.

    Attributes:
        position: in the answer.
        expected, found: token ids; -1 behind the end.
        gap: how much likelier plain vLLM holds its own token, in logprob; None: than a token that
            is not among the likeliest.
    """

    prompt: str
    batch: str
    position: int
    expected: int
    found: int
    gap: float | None
    is_noise: bool


@dataclass(frozen=True)
class Acceptance(Record):
    """vLLM's counters ``vllm:spec_decode_*`` over all answers; a tree's positions are levels."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: tuple[int, ...]

    @property
    def acceptance_length(self) -> float:
        """Accepted tokens of a draft, and the bonus token."""
        return 1 + self.num_accepted_tokens / max(self.num_drafts, 1)

    @property
    def rate_per_pos(self) -> tuple[float, ...]:
        """Share of drafts whose token at each position was accepted."""
        return tuple(n / max(self.num_drafts, 1) for n in self.num_accepted_tokens_per_pos)


@dataclass(frozen=True)
class AttentionCase(Record):
    """What attention backends are asked for.

    Attributes:
        feature: chain, masked positions in the draft; or tree, node codes in the target.
        padded_size: the engine's.
        decode_rows: rows that each request decodes.
        tree: the setting.
    """

    feature: str
    head_size: int
    padded_size: int
    num_heads: int
    num_kv_heads: int
    decode_rows: int
    tree: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionError(Record):
    """How far a backend is from fp32 softmax.

    Attributes:
        used_size: the engine's head size, or the next one that the backend serves.
        prompt, decode: largest differences; None if it was not run.
        reason: why the backend is not available.
        failure: what it raised although it says that it serves this.
    """

    case: AttentionCase
    backend: str
    used_size: int | None = None
    prompt: float | None = None
    decode: float | None = None
    reason: str | None = None
    failure: str | None = None

    @property
    def worst(self) -> float:
        """The larger difference."""
        return max(self.prompt or 0.0, self.decode or 0.0)


@dataclass(frozen=True)
class EngineResult(Record):
    """One engine, plain, chain or tree; None where it did not come that far.

    Attributes:
        log: file with all that it said.
        timings: medians over decode steps of one request, the device waited for: `target_step` of
            `execute_model`; `draft_first_pass`; `draft_step` of each further pass; `steps` of how
            many.
        error: in one line, why it did not start or did not get through.
        is_refusal: vllm-vispec refuses the settings.
    """

    name: str
    log: str
    state: EngineState | None = None
    answers: Answers = field(default_factory=dict)
    acceptance: Acceptance | None = None
    timings: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    is_refusal: bool = False


@dataclass(frozen=True)
class Verdict(Record):
    """Whether a feature works here: passed, failed or refused, and why not, a line each."""

    feature: str
    state: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verification(Record):
    """Everything on the page.

    Attributes:
        noise: None if plain vLLM did not answer.
        differences: by feature.
        tolerance: what attention may be off by.
    """

    schema_version: int
    command: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    engines: tuple[EngineResult, ...]
    noise: Noise | None
    differences: dict[str, tuple[Difference, ...]]
    attention: tuple[AttentionError, ...]
    tolerance: float
    verdicts: tuple[Verdict, ...]

    @property
    def exit_status(self) -> int:
        """0 only if nothing failed; a refusal is an answer."""
        return int(any(verdict.state == FAILED for verdict in self.verdicts))
