"""A roofline model of speculative decoding: what a pass costs, and what a step of it gains.

All results are estimates. Left out: tensor parallelism, activations, sampling, the vision tower
and prefills that share a step with decoding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, PositiveInt

from vllm_vispec.heads.folder import (
    CONFIG,
    is_draft_vlm,
    is_vispec_head,
    read_json,
    tensor_names,
)
from vllm_vispec.heads.formats import describe_other_draft, text_fields
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import parse

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0}
# Mixture-of-experts configs: how many weights a batch touches depends on its tokens.
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class PassShape:
    """What a forward pass of a model reads and computes.

    Attributes:
        weight_bytes: weights read once per pass, lm_head included.
        token_parameters: weights every token is multiplied with, lm_head not included.
        row_parameters: lm_head weights, multiplied with every token whose logits are wanted.
        kv_bytes_per_token: keys and values of one token of context, all layers.
        attention_flops_per_token: FLOPs of one token that attends to one token of context.
        passes_more: passes of a draft's step over the K that others have.
    """

    weight_bytes: float
    token_parameters: float
    row_parameters: float
    kv_bytes_per_token: float = 0.0
    attention_flops_per_token: float = 0.0
    passes_more: int = 0


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
    acceptance_length: float
    plain_s: float
    verify_s: float
    draft_first_s: float
    draft_step_s: float
    plain_bound: str
    verify_bound: str
    draft_bound: str
    step_s: float
    seconds_per_token: float
    decode_speedup: float


def acceptance_length(acceptance: Sequence[float], k: int) -> float:
    """Return 1 + the acceptance rates of the first K positions, as vLLM counts them.

    Raises:
        ViSpecError: a rate is missing or impossible, or they rise.
    """
    rates = list(acceptance)
    if not all(0 <= rate <= 1 for rate in rates):
        raise ViSpecError(f"acceptance {rates} has a value outside 0 to 1")
    if rates != sorted(rates, reverse=True):
        raise ViSpecError(
            f"acceptance {rates} rises: give the share of all steps that accept each position, "
            "not the share of those that accepted the one before"
        )
    if k > len(rates):
        raise ViSpecError(
            f"acceptance is given for {len(rates)} positions, K is {k}: give every position's"
        )
    return 1 + sum(rates[:k])


def predict(
    target: PassShape,
    draft: PassShape,
    hardware: Hardware,
    acceptance: Sequence[float],
    k: int,
    batch: int,
    context: float,
) -> Prediction:
    """Estimate plain decoding (a token per sequence) and a step of speculative decoding.

    Such a step is a target pass that verifies K + 1 tokens per sequence, the draft's first pass
    over the tokens of the step before (as many), and K - 1 draft passes over one token per
    sequence. A published model drafts nothing in its first pass and has one pass more.

    Args:
        acceptance: see `acceptance_length`.
        k: draft tokens; 0 is plain decoding.
        batch: sequences decoded at once.
        context: tokens of each of them, images included, on average over its answer.

    Raises:
        ViSpecError: the acceptance is impossible or does not cover K.
    """
    wide = batch * (k + 1)
    plain, plain_bound = hardware.run(target, batch, context, batch, batch)
    verify, verify_bound = hardware.run(target, batch, context, wide, wide)
    first, _ = hardware.run(draft, batch, context, wide, batch)
    later, draft_bound = hardware.run(draft, batch, context, batch, batch)
    tokens = acceptance_length(acceptance, k)
    step_s = verify + (first + (k - 1 + draft.passes_more) * later if k else 0.0)
    times, bounds = (plain, verify, first, later), (plain_bound, verify_bound, draft_bound)
    return Prediction(
        k, batch, tokens, *times, *bounds, step_s, step_s / tokens, plain * tokens / step_s
    )


class DecoderSizes(BaseModel):
    """Sizes of a decoder with gated MLPs, as config.json states them."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    vocab_size: PositiveInt
    dtype: str
    is_draft_vlm: bool

    @classmethod
    def read(cls, folder: Path, name: str, dtype: str | None = None) -> Self:
        """Read a folder's config.json; weights are not needed.

        Args:
            name: "target" or "head", for messages.
            dtype: overrides the one in config.json.

        Raises:
            ViSpecError: a size is missing or impossible; the message names file and field.
        """
        file = folder / "config.json"
        try:
            config: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise ViSpecError(
                f"--{name} {folder} has no readable config.json ({error}): give a local folder, or "
                f"--{name}-parameters"
            ) from error
        fields = text_fields(config)
        if experts := [field for field in _EXPERT_FIELDS if (fields.get(field) or 0) > 1]:
            raise ViSpecError(
                f"{file} has {experts[0]}: a mixture of experts reads a part of its weights, give "
                f"--{name}-parameters for what a pass touches"
            )
        if fields.get("quantization_config") and dtype is None:
            raise ViSpecError(
                f"{file} has a quantization_config: give --dtype fp8, or --{name}-parameters with "
                f"--{name}-bytes-per-parameter"
            )
        stated = str(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16")
        dtype = dtype or stated.removeprefix("torch.")
        if dtype not in DTYPE_BYTES:
            raise ViSpecError(f"dtype {dtype} is unknown: use one of {', '.join(DTYPE_BYTES)}")
        values = {**fields, "dtype": dtype, "is_draft_vlm": is_draft_vlm(config)}
        return parse(cls, values, lambda field: f"{field} in {file}")

    def pass_shape(self, lm_head_rows: int, layers: int, extra_parameters: int = 0) -> PassShape:
        """Shape of a pass through some layers, further products and an lm_head.

        A layer has hidden * (2 * q + 2 * kv + 3 * intermediate) weights, norms and biases left out
        (q, kv: heads * head_dim), and 2 * kv keys and values per token. Attention takes 4 * q FLOPs
        per layer, token and token of context (scores and weighted sum, a product and a sum each).
        """
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        q = self.num_attention_heads * head_dim
        kv = (self.num_key_value_heads or self.num_attention_heads) * head_dim
        layer = self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size)
        parameters, lm_head = layers * layer + extra_parameters, self.hidden_size * lm_head_rows
        width = DTYPE_BYTES[self.dtype]
        # With fp8 weights vLLM keeps lm_head, keys and values in 16 bits unless told otherwise.
        wide = max(width, DTYPE_BYTES["bfloat16"])
        return PassShape(
            weight_bytes=parameters * width + lm_head * wide,
            token_parameters=parameters,
            row_parameters=lm_head,
            kv_bytes_per_token=2 * layers * kv * wide,
            attention_flops_per_token=4 * layers * q,
        )


def _is_published(folder: Path) -> bool:
    """Whether a draft is a model of its own: heads, too, may have their target's config.json."""
    if is_vispec_head(folder):
        return False
    config = read_json(folder / CONFIG)
    try:
        return describe_other_draft(config, tensor_names(folder)) is None
    except ViSpecError:
        # No weights.
        return "vision_config" in config


def target_shape(folder: Path, dtype: str | None = None) -> PassShape:
    """Shape of a target's decoding pass; its vision tower does not run then.

    Raises:
        ViSpecError: config.json is missing, unusable, or describes experts or a quantization.
    """
    sizes = DecoderSizes.read(folder, "target", dtype)
    return sizes.pass_shape(sizes.vocab_size, sizes.num_hidden_layers)


def draft_shape(
    folder: Path, target: Path, dtype: str | None = None, draft_vocab: int | None = None
) -> PassShape:
    """Shape of a head's pass: one layer, `fc`, and the target's lm_head; of a model's: its own.

    `fc` is hidden x 2 hidden. `img_fc` is a constant per image by then and the adaptor runs only in
    prefills, so neither counts.

    Args:
        folder: the head, in any checkpoint format, or the published model.
        target: whose lm_head it uses.
        dtype: overrides both config.json files.
        draft_vocab: rows of a smaller lm_head for the draft; None: the target's.

    Raises:
        ViSpecError: see `target_shape`; or the two do not fit each other, or `draft_vocab` exceeds
            the target's vocabulary.
    """
    owner = DecoderSizes.read(target, "target", dtype)
    sizes = DecoderSizes.read(folder, "head", owner.dtype)  # vLLM runs both in one dtype
    rows = owner.vocab_size if draft_vocab is None else draft_vocab
    if not 1 <= rows <= owner.vocab_size:
        raise ViSpecError(
            f"--draft-vocab {rows} is outside 1 to {owner.vocab_size}, the target's vocabulary"
        )
    if _is_published(folder):
        return replace(sizes.pass_shape(rows, sizes.num_hidden_layers), passes_more=1)
    if sizes.is_draft_vlm:
        return sizes.pass_shape(rows, sizes.num_hidden_layers)
    if sizes.hidden_size != owner.hidden_size:
        raise ViSpecError(
            f"--head {folder} has hidden_size {sizes.hidden_size}, the target {owner.hidden_size}: "
            "give the target the head was trained for"
        )
    return sizes.pass_shape(rows, 1, 2 * sizes.hidden_size**2)
