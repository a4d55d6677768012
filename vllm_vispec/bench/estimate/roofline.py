"""The formulas: how long a pass takes, how long a round takes, what that makes of plain decoding.

All results are estimates. Left out: tensor parallelism, activations, sampling, the vision tower
and prefills that share a step with decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from vllm_vispec.errors import ViSpecError


@dataclass(frozen=True)
class PassShape:
    """What a forward pass of a model reads and computes; all zeros is a model that costs nothing.

    Attributes:
        weight_bytes: weights read once per pass, lm_head included.
        token_parameters: weights every token is multiplied with, lm_head not included.
        row_parameters: lm_head weights, multiplied with every token whose logits are wanted.
        kv_bytes_per_token: keys and values of one token of context, all layers.
        attention_flops_per_token: FLOPs of one token that attends to one token of context.
    """

    weight_bytes: float
    token_parameters: float
    row_parameters: float
    kv_bytes_per_token: float = 0.0
    attention_flops_per_token: float = 0.0

    def bytes_read(self, batch: int, context: float) -> float:
        """Bytes of a pass: weight_bytes + batch * context * kv_bytes_per_token."""
        return self.weight_bytes + batch * context * self.kv_bytes_per_token

    def flops(self, tokens: int, rows: int, context: float) -> float:
        """FLOPs of a pass.

        2 * (tokens * token_parameters + rows * row_parameters)
        + tokens * context * attention_flops_per_token

        Args:
            tokens: tokens of all sequences in the pass.
            rows: those of them whose logits are wanted.
            context: tokens each of them attends to.
        """
        products = 2 * (tokens * self.token_parameters + rows * self.row_parameters)
        return products + tokens * context * self.attention_flops_per_token


@dataclass(frozen=True)
class Hardware:
    """Rates to calculate with: what is reached, not what a data sheet says.

    Attributes:
        bandwidth: bytes/s.
        flops: FLOP/s.
        pass_overhead_s: seconds of every pass that are neither reading nor computing (kernel
            launches, host work).

    Raises:
        ViSpecError: a rate is not positive, or the overhead is negative.
    """

    bandwidth: float
    flops: float
    pass_overhead_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("bandwidth", "flops"):
            if getattr(self, name) <= 0:
                raise ViSpecError(f"{name} {getattr(self, name)} is no rate: use more than 0")
        if self.pass_overhead_s < 0:
            raise ViSpecError(f"pass overhead {self.pass_overhead_s} s is negative: use 0 or more")

    def seconds(self, bytes_read: float, flops: float) -> float:
        """Seconds of a pass: overhead + max(bytes / bandwidth, flops / peak)."""
        return self.pass_overhead_s + max(bytes_read / self.bandwidth, flops / self.flops)

    def bound(self, bytes_read: float, flops: float) -> str:
        """Which rate limits a pass: "bandwidth" or "compute"."""
        is_compute = flops / self.flops > bytes_read / self.bandwidth
        return "compute" if is_compute else "bandwidth"


@dataclass(frozen=True)
class Workload:
    """What is decoded.

    Attributes:
        batch: sequences decoded at once.
        context: tokens of each of them, images included, on average over its answer.
        draft_context: tokens the draft reads keys and values of; None: the same. Less where KV
            blocks of masked image tokens are dropped.

    Raises:
        ViSpecError: a value is impossible.
    """

    batch: int = 1
    context: float = 0.0
    draft_context: float | None = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ViSpecError(f"batch {self.batch} is too small: use at least 1")
        if min(self.context, self.draft_context or 0) < 0:
            raise ViSpecError("context is negative: use 0 or more tokens")

    @property
    def draft_reads(self) -> float:
        """Tokens of context the draft reads."""
        return self.context if self.draft_context is None else self.draft_context


@dataclass(frozen=True)
class Acceptance:
    """Share of rounds that accept the draft token at each position, as vLLM counts it.

    Raises:
        ViSpecError: no shares, or they rise: then they are not counted over all rounds.
    """

    by_position: tuple[float, ...]

    def __post_init__(self) -> None:
        shares = (1.0, *self.by_position)
        if any(not 0 <= share <= 1 for share in shares):
            raise ViSpecError(f"acceptance {list(self.by_position)} has a value outside 0 to 1")
        if any(later > earlier for earlier, later in pairwise(shares)):
            raise ViSpecError(
                f"acceptance {list(self.by_position)} rises: give the share of all rounds that "
                "accept each position, not the share of those that accepted the one before"
            )

    @classmethod
    def constant(cls, rate: float, num_speculative_tokens: int) -> Acceptance:
        """Every token is accepted with the same probability if the one before was: rate ** k."""
        return cls(tuple(rate**k for k in range(1, num_speculative_tokens + 1)))

    def tokens_per_round(self, num_speculative_tokens: int) -> float:
        """1 + the sum of the shares of the first K positions.

        Raises:
            ViSpecError: there are fewer than K.
        """
        if num_speculative_tokens > len(self.by_position):
            raise ViSpecError(
                f"acceptance is given for {len(self.by_position)} positions, K is "
                f"{num_speculative_tokens}: give a share for every position"
            )
        return 1 + sum(self.by_position[:num_speculative_tokens])


@dataclass(frozen=True)
class Prediction:
    """An estimate for one K and one workload. Seconds are per pass or per round.

    Attributes:
        plain_s: plain decoding, one pass: one token per sequence.
        verify_s: target pass over K + 1 tokens per sequence.
        draft_first_s: the draft's pass over the tokens of the round before (K + 1 per sequence).
        draft_step_s: each further draft pass (one token per sequence).
        plain_bound, verify_bound, draft_bound: "bandwidth" or "compute".
    """

    num_speculative_tokens: int
    batch: int
    tokens_per_round: float
    plain_s: float
    verify_s: float
    draft_first_s: float
    draft_step_s: float
    plain_bound: str
    verify_bound: str
    draft_bound: str

    @property
    def round_s(self) -> float:
        """verify_s + draft_first_s + (K - 1) * draft_step_s; plain_s if K is 0."""
        k = self.num_speculative_tokens
        return self.verify_s + (self.draft_first_s + (k - 1) * self.draft_step_s if k else 0.0)

    @property
    def seconds_per_token(self) -> float:
        """Of one sequence: round_s / tokens_per_round."""
        return self.round_s / self.tokens_per_round

    @property
    def decode_speedup(self) -> float:
        """plain_s / seconds_per_token."""
        return self.plain_s / self.seconds_per_token

    def to_json(self) -> dict[str, Any]:
        """Plain data, marked as an estimate."""
        derived = {"round_s": self.round_s, "decode_speedup": self.decode_speedup}
        return {"kind": "estimate", **asdict(self), **derived}


def predict(
    target: PassShape,
    draft: PassShape,
    hardware: Hardware,
    work: Workload,
    acceptance: Acceptance | Sequence[float],
    num_speculative_tokens: int,
) -> Prediction:
    """Estimate decode_speedup.

    With B sequences, K draft tokens, context c (c_d for the draft) and pass times t = overhead +
    max(bytes / bandwidth, flops / peak):

        plain        t_target(B tokens, B rows of logits, c)
        verify       t_target(B (K + 1) tokens, B (K + 1) rows, c)
        draft first  t_draft(B (K + 1) tokens, B rows, c_d)
        draft step   t_draft(B tokens, B rows, c_d), K - 1 times
        tokens_per_round = 1 + sum of the acceptance at positions 1 to K
        decode_speedup   = tokens_per_round * plain / (verify + first + (K - 1) * step)

    Raises:
        ViSpecError: K is negative, or the acceptance does not cover it.
    """
    k, batch = num_speculative_tokens, work.batch
    if k < 0:
        raise ViSpecError(f"num_speculative_tokens {k} is negative: use 0 (plain) or more")
    if not isinstance(acceptance, Acceptance):
        acceptance = Acceptance(tuple(acceptance))
    wide = batch * (k + 1)
    target_bytes = target.bytes_read(batch, work.context)
    draft_bytes = draft.bytes_read(batch, work.draft_reads)
    plain = (target_bytes, target.flops(batch, batch, work.context))
    verify = (target_bytes, target.flops(wide, wide, work.context))
    first = (draft_bytes, draft.flops(wide, batch, work.draft_reads))
    step = (draft_bytes, draft.flops(batch, batch, work.draft_reads))
    # A draft that costs nothing has no overhead, either.
    is_free = draft == FREE
    return Prediction(
        num_speculative_tokens=k,
        batch=batch,
        tokens_per_round=acceptance.tokens_per_round(k),
        plain_s=hardware.seconds(*plain),
        verify_s=hardware.seconds(*verify),
        draft_first_s=0.0 if is_free else hardware.seconds(*first),
        draft_step_s=0.0 if is_free else hardware.seconds(*step),
        plain_bound=hardware.bound(*plain),
        verify_bound=hardware.bound(*verify),
        draft_bound=hardware.bound(*step),
    )


FREE = PassShape(0.0, 0.0, 0.0)
"""A draft that costs nothing: the limit of what a better draft can gain."""
