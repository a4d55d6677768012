"""From config.json files, or from numbers, to what a pass reads and computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from vllm_vispec.bench.estimate.roofline import PassShape
from vllm_vispec.heads.formats.fields import text_fields
from vllm_vispec.heads.load import is_draft_vlm
from vllm_vispec.utils.errors import ViSpecError

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0}
# Mixture-of-experts configs: how many weights a batch touches depends on its tokens.
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")


class DecoderSizes(BaseModel):
    """Sizes of a decoder with gated MLPs, as config.json states them."""

    model_config = ConfigDict(strict=True, frozen=True)

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
        given = {**fields, "dtype": dtype, "is_draft_vlm": is_draft_vlm(config)}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            field = str(error.errors()[0]["loc"][0])
            raise ViSpecError(
                f"{field} in {file} is {fields.get(field)!r}, it must be an integer of at least 1: "
                "correct it, or give the sizes as numbers"
            ) from error

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
    """Shape of a head's pass: one layer, `fc`, and the target's lm_head; of a draft VLM's: its own.

    `fc` is hidden x 2 hidden. `img_fc` is a constant per image by then and the adaptor runs only in
    prefills, so neither counts.

    Args:
        folder: the head, any dialect.
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
    if sizes.is_draft_vlm:
        return sizes.pass_shape(rows, sizes.num_hidden_layers)
    if sizes.hidden_size != owner.hidden_size:
        raise ViSpecError(
            f"--head {folder} has hidden_size {sizes.hidden_size}, the target {owner.hidden_size}: "
            "give the target the head was trained for"
        )
    return sizes.pass_shape(rows, 1, 2 * sizes.hidden_size**2)
