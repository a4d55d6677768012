"""What `vispec verify` writes down, as JSON; times in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_vispec.bench.schema import Record

SCHEMA_VERSION = 1
PASSED, FAILED, REFUSED = "passed", "failed", "refused"
PLAIN, CHAIN, TREE = "plain", "chain", "tree"


@dataclass(frozen=True)
class Layers(Record):
    """Attention layers that are alike.

    Attributes:
        count: how many.
        backend: vLLM's name.
        head_size, padded_size: the model's, and the KV cache's; equal where nothing is padded.
        num_heads, num_kv_heads: on one worker.
        kv_cache_dtype: vLLM's name, and what the cache's tensor holds.
    """

    count: int
    backend: str
    head_size: int
    padded_size: int
    num_heads: int
    num_kv_heads: int
    kv_cache_dtype: str


@dataclass(frozen=True)
class Graphs(Record):
    """CUDA graphs of one kind.

    Attributes:
        owner: what replays them.
        mode: vLLM's name, FULL or PIECEWISE.
        num_tokens: sizes of their batches.
    """

    owner: str
    mode: str
    num_tokens: tuple[int, ...]


@dataclass(frozen=True)
class EngineState(Record):
    """What a running engine is made of, as its first worker sees it.

    Attributes:
        runner: V1 or V2.
        device_type, device, capability: vLLM's names.
        dtype: of the target.
        target, draft: attention layers.
        compilation: mode, backend and vLLM's counters of what was compiled.
        cudagraph_mode: vLLM's name.
        graphs: what was captured.
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
    graphs: tuple[Graphs, ...]


@dataclass(frozen=True)
class Answer(Record):
    """One greedy answer.

    Attributes:
        token_ids: until the stop token or the longest answer.
        top: for plain vLLM, of each position the likeliest tokens and their logprobs.
        error: why the engine did not answer.
    """

    token_ids: tuple[int, ...] = ()
    top: tuple[dict[int, float], ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Difference(Record):
    """The first token at which an answer differs from plain vLLM's.

    Attributes:
        prompt: its name.
        batch: "alone" or "together".
        position: in the answer, from 0.
        expected, found: token ids.
        gap: how much likelier plain vLLM holds its own token, in logprob.
        gap_is_least: the other token is not among those that were recorded; the gap is larger.
        is_noise: the gap lies within the noise.
    """

    prompt: str
    batch: str
    position: int
    expected: int
    found: int
    gap: float
    gap_is_least: bool
    is_noise: bool


@dataclass(frozen=True)
class Noise(Record):
    """How plain vLLM differs from itself.

    Attributes:
        measured: largest change of the gap between the two likeliest tokens, alone and together.
        rounding: two rounding steps of a logit of 16 in the target's dtype.
        differing: prompts that plain vLLM answers otherwise alone than together.
    """

    measured: float
    rounding: float
    differing: int

    @property
    def limit(self) -> float:
        """The largest gap that still counts as noise."""
        return max(self.measured, self.rounding)


@dataclass(frozen=True)
class Acceptance(Record):
    """vLLM's counters ``vllm:spec_decode_*`` over all answers.

    Attributes:
        num_drafts, num_draft_tokens, num_accepted_tokens: as vLLM counts.
        num_accepted_tokens_per_pos: a tree's positions are levels.
    """

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
        drafts = max(self.num_drafts, 1)
        return tuple(count / drafts for count in self.num_accepted_tokens_per_pos)


@dataclass(frozen=True)
class Timings(Record):
    """Medians over decode steps of one request, the device waited for; None if there was none.

    Attributes:
        target_step: `execute_model`, the target's pass over the draft tokens.
        draft_first_pass: from the proposer's call to its first token.
        draft_step: each further pass.
        steps: how many were measured.
    """

    target_step: float | None = None
    draft_first_pass: float | None = None
    draft_step: float | None = None
    steps: int = 0


@dataclass(frozen=True)
class AttentionCase(Record):
    """What an attention backend is asked for.

    Attributes:
        feature: chain (masked positions of the draft) or tree (path codes of the target).
        head_size: the model's.
        padded_size: the engine's.
        decode_rows: rows that each request decodes.
        tree: the setting; None for masked positions.
    """

    feature: str
    head_size: int
    padded_size: int
    num_heads: int
    num_kv_heads: int
    decode_rows: int
    tree: dict[str, Any] | None = None


@dataclass(frozen=True)
class AttentionError(Record):
    """What came of it.

    Attributes:
        used_size: head size that was tried: the engine's, or the next that the backend takes.
        prompt, decode: largest differences from fp32 softmax; None if it was not run.
        reason: why the backend is not available.
        failure: why it did not run although it said that it serves this.
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
        """The larger of both differences; 0 if it was not run."""
        return max(self.prompt or 0.0, self.decode or 0.0)


@dataclass(frozen=True)
class Verdict(Record):
    """Whether a feature works here.

    Attributes:
        state: passed, failed or refused.
        reasons: one line each; empty if it passed.
    """

    feature: str
    state: str
    reasons: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """A refusal is an answer, no failure."""
        return self.state != FAILED


@dataclass(frozen=True)
class EngineResult(Record):
    """One engine: what it is, what it answered, how fast it was.

    Attributes:
        name: plain, chain or tree.
        log: file with everything that it said.
        state: None if it did not start.
        answers: by batch ("alone", "together") and prompt.
        error: one line, why it did not start or did not finish.
        is_refusal: whether vllm-vispec refused the settings.
    """

    name: str
    log: str
    state: EngineState | None = None
    answers: dict[str, dict[str, Answer]] | None = None
    acceptance: Acceptance | None = None
    timings: Timings | None = None
    error: str | None = None
    is_refusal: bool = False


@dataclass(frozen=True)
class Verification(Record):
    """Everything on the page.

    Attributes:
        schema_version: of this record.
        command: what was run.
        environment: machine and versions.
        settings: what was asked for.
        engines: plain, chain and tree, as far as they were started.
        left_out: prompts that plain vLLM does not answer, and why.
        noise: None if plain vLLM did not start.
        differences: by feature.
        attention: errors of every backend.
        tolerance: what these may be.
        verdicts: by feature.
    """

    schema_version: int
    command: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    engines: tuple[EngineResult, ...]
    left_out: dict[str, str]
    noise: Noise | None
    differences: dict[str, tuple[Difference, ...]]
    attention: tuple[AttentionError, ...]
    tolerance: float
    verdicts: tuple[Verdict, ...]

    @property
    def exit_status(self) -> int:
        """0 only if nothing failed."""
        return 0 if all(verdict.ok for verdict in self.verdicts) else 1

    def engine(self, name: str) -> EngineResult | None:
        """Return an engine's result by its name."""
        return next((one for one in self.engines if one.name == name), None)
