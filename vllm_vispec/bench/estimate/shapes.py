"""From config.json files, or from numbers, to what a pass reads and computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_vispec.bench.estimate.roofline import PassShape
from vllm_vispec.dialects.fields import text_fields
from vllm_vispec.dialects.load import is_draft_vlm
from vllm_vispec.errors import ViSpecError

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0}
# Mixture-of-experts configs: how many weights a batch touches depends on its tokens.
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class DecoderSizes:
    """Sizes of a decoder with gated MLPs, as config.json states them.

    Raises:
        ViSpecError: a size is missing or impossible; the message names file and field.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    dtype: str

    @classmethod
    def read(cls, folder: Path, name: str, dtype: str | None = None) -> DecoderSizes:
        """Read a folder's config.json.

        Args:
            folder: holds config.json; weights are not needed.
            name: "target" or "head", for messages.
            dtype: overrides the one in config.json.
        """
        config = _read_config(folder, name)
        fields = text_fields(config)
        _refuse_unknown(fields, folder, name, dtype)
        heads = _size(fields, "num_attention_heads", folder)
        hidden = _size(fields, "hidden_size", folder)
        stated = fields.get("dtype") or fields.get("torch_dtype") or "bfloat16"
        return cls(
            hidden_size=hidden,
            intermediate_size=_size(fields, "intermediate_size", folder),
            num_hidden_layers=_size(fields, "num_hidden_layers", folder),
            num_attention_heads=heads,
            num_key_value_heads=_size(fields, "num_key_value_heads", folder, heads),
            head_dim=_size(fields, "head_dim", folder, hidden // heads),
            vocab_size=_size(fields, "vocab_size", folder),
            dtype=_known_dtype(dtype or str(stated).removeprefix("torch.")),
        )

    @property
    def layer_parameters(self) -> int:
        """Of one layer: hidden * (2 * q + 2 * kv + 3 * intermediate), norms and biases left out.

        q is num_attention_heads * head_dim, kv is num_key_value_heads * head_dim.
        """
        q = self.num_attention_heads * self.head_dim
        kv = self.num_key_value_heads * self.head_dim
        return self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size)

    def pass_shape(self, layers: int, extra_parameters: int, lm_head_parameters: int) -> PassShape:
        """Shape of a pass through some layers, further products and an lm_head.

        Keys and values: 2 * layers * num_key_value_heads * head_dim values per token. Attention:
        4 * layers * num_attention_heads * head_dim FLOPs per token and token of context (scores
        and weighted sum, a product and a sum each).
        """
        width = DTYPE_BYTES[self.dtype]
        parameters = layers * self.layer_parameters + extra_parameters
        kv_values = 2 * layers * self.num_key_value_heads * self.head_dim
        # With fp8 weights vLLM keeps lm_head, keys and values in 16 bits unless told otherwise.
        wide = max(width, DTYPE_BYTES["bfloat16"])
        return PassShape(
            weight_bytes=parameters * width + lm_head_parameters * wide,
            token_parameters=parameters,
            row_parameters=lm_head_parameters,
            kv_bytes_per_token=kv_values * wide,
            attention_flops_per_token=4 * layers * self.num_attention_heads * self.head_dim,
        )


def target_shape(folder: Path, dtype: str | None = None) -> PassShape:
    """Shape of a target's decoding pass; its vision tower does not run then.

    Raises:
        ViSpecError: config.json is missing, unusable, or describes experts or a quantization.
    """
    sizes = DecoderSizes.read(folder, "target", dtype)
    lm_head = sizes.hidden_size * sizes.vocab_size
    return sizes.pass_shape(sizes.num_hidden_layers, 0, lm_head)


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
    is_vlm = is_draft_vlm(_read_config(folder, "head"))
    if sizes.hidden_size != owner.hidden_size and not is_vlm:
        raise ViSpecError(
            f"--head {folder} has hidden_size {sizes.hidden_size}, the target {owner.hidden_size}: "
            "give the target the head was trained for"
        )
    rows = owner.vocab_size if draft_vocab is None else draft_vocab
    if not 1 <= rows <= owner.vocab_size:
        raise ViSpecError(
            f"--draft-vocab {rows} is outside 1 to {owner.vocab_size}, the target's vocabulary"
        )
    lm_head = sizes.hidden_size * rows
    if is_vlm:
        return sizes.pass_shape(sizes.num_hidden_layers, 0, lm_head)
    return sizes.pass_shape(1, 2 * sizes.hidden_size**2, lm_head)


def explicit_shape(
    parameters: float,
    lm_head_parameters: float,
    bytes_per_parameter: float = 2.0,
    kv_bytes_per_token: float = 0.0,
) -> PassShape:
    """Shape from numbers; the FLOPs of attention are left out.

    Args:
        parameters: weights of the decoder that a token passes, lm_head not included.
        lm_head_parameters: hidden size * vocabulary.
        bytes_per_parameter: e.g. 2 for bfloat16, 0.5 for 4 bits.
        kv_bytes_per_token: keys and values of a token of context, all layers.

    Raises:
        ViSpecError: a number is negative.
    """
    values = (parameters, lm_head_parameters, bytes_per_parameter, kv_bytes_per_token)
    if min(values) < 0:
        raise ViSpecError(f"sizes {values} have a negative one: use 0 or more")
    weights = (parameters + lm_head_parameters) * bytes_per_parameter
    return PassShape(weights, parameters, lm_head_parameters, kv_bytes_per_token)


def _read_config(folder: Path, name: str) -> Mapping[str, Any]:
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ViSpecError(
            f"--{name} {folder} has no readable config.json ({error.strerror}): give a local "
            f"folder, or --{name}-parameters"
        ) from error
    except ValueError as error:
        raise ViSpecError(f"{file} is not JSON ({error}): download it again") from error
    if not isinstance(content, Mapping):
        raise ViSpecError(f"{file} is no JSON object: download it again")
    return content


def _refuse_unknown(fields: Mapping[str, Any], folder: Path, name: str, dtype: str | None) -> None:
    experts = [field for field in _EXPERT_FIELDS if (fields.get(field) or 0) > 1]
    if experts:
        raise ViSpecError(
            f"{folder}/config.json has {experts[0]}: a mixture of experts reads a part of its "
            f"weights, give --{name}-parameters for what a pass touches"
        )
    if fields.get("quantization_config") and dtype is None:
        raise ViSpecError(
            f"{folder}/config.json has a quantization_config: give --dtype fp8, or "
            f"--{name}-parameters with --{name}-bytes-per-parameter"
        )


def _size(fields: Mapping[str, Any], field: str, folder: Path, default: int | None = None) -> int:
    value = fields.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ViSpecError(
            f"{field} in {folder}/config.json is {value!r}, it must be an integer of at least 1: "
            "correct it, or give the sizes as numbers"
        )
    return value


def _known_dtype(dtype: str) -> str:
    if dtype not in DTYPE_BYTES:
        raise ViSpecError(f"dtype {dtype} is unknown: use one of {', '.join(DTYPE_BYTES)}")
    return dtype
