"""The formulas: how long a pass takes, how long a round takes, what that makes of plain decoding.

All results are estimates. Left out: tensor parallelism, activations, sampling, the vision tower
and prefills that share a step with decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vllm_vispec.utils.errors import ViSpecError


@dataclass(frozen=True)
class PassShape:
    """What a forward pass of a model reads and computes.

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


FREE = PassShape(0.0, 0.0, 0.0)
"""A draft that costs nothing, overhead included: the limit of what a better draft can gain."""


@dataclass(frozen=True)
class Hardware:
    """Rates as they are reached: bytes/s, FLOP/s, and seconds of a pass that are neither."""

    bandwidth: float
    flops: float
    pass_overhead_s: float = 0.0

    def run(
        self, shape: PassShape, batch: int, context: float, tokens: int, rows: int
    ) -> tuple[float, str]:
        """Return the seconds of a pass, and which rate limits it: "bandwidth" or "compute".

        Args:
            batch: sequences whose keys and values are read, `context` tokens of each.
            tokens: tokens of all sequences in the pass.
            rows: those of them whose logits are wanted.
        """
        products = tokens * shape.token_parameters + rows * shape.row_parameters
        flops = 2 * products + tokens * context * shape.attention_flops_per_token
        reading = (shape.weight_bytes + batch * context * shape.kv_bytes_per_token) / self.bandwidth
        computing = flops / self.flops
        limit = "compute" if computing > reading else "bandwidth"
        return self.pass_overhead_s + max(reading, computing), limit


@dataclass(frozen=True)
class Prediction:
    """An estimate for one K and one batch size; `predict` has the passes. Seconds per pass."""

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
    round_s: float
    seconds_per_token: float
    decode_speedup: float


def tokens_per_round(acceptance: Sequence[float], k: int) -> float:
    """Return 1 + the shares of rounds that accept the first K draft tokens, as vLLM counts them.

    Raises:
        ViSpecError: a share is missing or impossible, or they rise.
    """
    shares = list(acceptance)
    if any(not 0 <= share <= 1 for share in shares):
        raise ViSpecError(f"acceptance {shares} has a value outside 0 to 1")
    if any(later > earlier for earlier, later in pairwise(shares)):
        raise ViSpecError(
            f"acceptance {shares} rises: give the share of all rounds that accept each position, "
            "not the share of those that accepted the one before"
        )
    if k > len(shares):
        raise ViSpecError(
            f"acceptance is given for {len(shares)} positions, K is {k}: give every position's"
        )
    return 1 + sum(shares[:k])


def predict(
    target: PassShape,
    draft: PassShape,
    hardware: Hardware,
    acceptance: Sequence[float],
    k: int,
    batch: int,
    context: float,
    draft_context: float | None = None,
) -> Prediction:
    """Estimate plain decoding (a token per sequence) and a round.

    A round is a target pass that verifies K + 1 tokens per sequence, the draft's first pass over
    the tokens of the round before (as many), and K - 1 draft passes over one token per sequence.

    Args:
        acceptance: see `tokens_per_round`.
        k: draft tokens; 0 is plain decoding.
        batch: sequences decoded at once.
        context: tokens of each of them, images included, on average over its answer.
        draft_context: those of which the draft reads keys and values; None: as many. Less where KV
            blocks of masked image tokens are dropped.

    Raises:
        ViSpecError: the acceptance is impossible or does not cover K.
    """
    wide, reads = batch * (k + 1), context if draft_context is None else draft_context
    plain, plain_bound = hardware.run(target, batch, context, batch, batch)
    verify, verify_bound = hardware.run(target, batch, context, wide, wide)
    first, _ = hardware.run(draft, batch, reads, wide, batch)
    step, draft_bound = hardware.run(draft, batch, reads, batch, batch)
    if draft == FREE:
        first = step = 0.0
    tokens = tokens_per_round(acceptance, k)
    round_s = verify + (first + (k - 1) * step if k else 0.0)
    times, bounds = (plain, verify, first, step), (plain_bound, verify_bound, draft_bound)
    return Prediction(
        k, batch, tokens, *times, *bounds, round_s, round_s / tokens, plain * tokens / round_s
    )
