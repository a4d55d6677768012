"""The frozen target in training: its input embeddings and hidden states on batches of samples.

Tensor names end in their shape: B batch, L tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_vispec.data.encode import Encoded
from vllm_vispec.heads.target import load_target_config
from vllm_vispec.train.batch import Observed
from vllm_vispec.utils.errors import ViSpecError, first_line

# Weight files are known by their size and this many blocks of this size, spread evenly.
_BLOCKS, _BLOCK_BYTES = 64, 2**16


@dataclass(frozen=True)
class TrainingTarget:
    """A frozen Hugging Face vision-language model.

    Attributes:
        model: the model, in evaluation mode, without gradients.
        folder: where it came from.
        image_token_id: the id of image placeholders.
        takes_token_types: its forward wants to know which tokens are images (M-RoPE).
    """

    model: Any
    folder: str
    image_token_id: int
    takes_token_types: bool

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype, device: str) -> TrainingTarget:
        """Load a target from a local folder (nothing is fetched then) or a hub id.

        Raises:
            ViSpecError: it cannot be read, has no vision part, or is not built as
                `model.model.language_model` plus `lm_head`.
        """
        config = load_target_config(folder)
        model = _load_model(folder, dtype)
        _check_structure(model, folder)
        model.requires_grad_(False)
        model.eval().to(device)
        forward = inspect.signature(type(model.model).forward)
        return cls(
            model, str(folder), image_token_id(config), "mm_token_type_ids" in forward.parameters
        )

    @property
    def text_config(self) -> Any:
        """The configuration of the language model."""
        return self.model.config.get_text_config()

    @property
    def model_type(self) -> str:
        """`model_type` of the whole model, e.g. "qwen2_5_vl"."""
        return str(self.model.config.model_type)

    @property
    def embed_VD(self) -> Tensor:
        """Input embedding table (the model's own tensor)."""
        return self.model.get_input_embeddings().weight

    @property
    def lm_head_VD(self) -> Tensor:
        """Output projection (the model's own tensor)."""
        return self.model.get_output_embeddings().weight

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        return self.embed_VD.device

    def observe(self, samples: Sequence[Encoded]) -> list[Observed]:
        """Run the target on samples, padded on the right. Results equal one by one up to rounding.

        Returns:
            One `Observed` per sample, tensors in the target's dtype and on its device.

        Raises:
            ViSpecError: the processor's image tensors do not fit the model.
        """
        if not samples:
            return []
        inputs = self._inputs(samples)
        # no_grad, not inference_mode: the draft's backward pass saves these tensors.
        with torch.no_grad(), _input_embeddings(self.model.model.language_model) as embeds:
            try:
                hidden_BLD = self.model.model(**inputs, use_cache=False).last_hidden_state
            except (ValueError, RuntimeError, IndexError) as error:
                ids = ", ".join(sample.sample_id for sample in samples)
                raise ViSpecError(
                    f"the target {self.folder} fails on the samples {ids} ({error}): use the "
                    "processor that belongs to it"
                ) from error
        return [
            self._observed(sample, embeds[0][b], hidden_BLD[b]) for b, sample in enumerate(samples)
        ]

    def _inputs(self, samples: Sequence[Encoded]) -> dict[str, Any]:
        length = max(len(sample.token_ids) for sample in samples)
        filler = 0 if self.image_token_id != 0 else 1

        def pad(row_L: Tensor, value: int) -> Tensor:
            return F.pad(row_L, (0, length - len(row_L)), value=value)

        ids_BL = torch.stack([pad(sample.token_ids, filler) for sample in samples]).to(self.device)
        valid_BL = torch.stack([pad(torch.ones_like(s.token_ids), 0) for s in samples])
        inputs: dict[str, Any] = {"input_ids": ids_BL, "attention_mask": valid_BL.to(self.device)}
        if self.takes_token_types:
            inputs["mm_token_type_ids"] = (ids_BL == self.image_token_id).to(torch.int32)
        dtype = self.embed_VD.dtype
        for name, value in merge_vision([sample.vision for sample in samples]).items():
            value = value.to(self.device)
            inputs[name] = value.to(dtype) if value.is_floating_point() else value
        return inputs

    def _observed(self, sample: Encoded, embeds_LD: Tensor, hidden_LD: Tensor) -> Observed:
        count = len(sample.token_ids)
        return Observed(
            sample_id=sample.sample_id,
            family=sample.family,
            token_ids=sample.token_ids.to(self.device),
            answer=sample.answer.to(self.device),
            runs=sample.runs,
            embeds_LD=embeds_LD[:count],
            hidden_LD=hidden_LD[:count],
        )


@dataclass(frozen=True)
class TargetFacts:
    """What training needs to know of the target besides its states.

    Attributes:
        text_config: transformers config of its language model.
        embed_VD, lm_head_VD: its tables, on the run's device, in its dtype.
    """

    model_type: str
    text_config: Any
    embed_VD: Tensor
    lm_head_VD: Tensor

    @classmethod
    def of(cls, target: TrainingTarget) -> TargetFacts:
        """Facts of a loaded target."""
        return cls(
            target.model_type,
            target.text_config,
            target.embed_VD.detach(),
            target.lm_head_VD.detach(),
        )


def target_id(model: str) -> str:
    """Return an id of a target's exact content: a digest of a local folder, else the hub id."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    total = hashlib.sha256()
    patterns = ("*.json", "*.jinja", "*.safetensors")
    for file in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        size = file.stat().st_size
        total.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as source:
            for block in range(_BLOCKS):
                source.seek(size * block // _BLOCKS)
                total.update(source.read(_BLOCK_BYTES))
    return total.hexdigest()


def image_token_id(config: Any) -> int:
    """Id of the image placeholder in a target's token ids.

    Raises:
        ViSpecError: the configuration does not state it.
    """
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise ViSpecError(
        f"the target's config.json ({config.model_type}) states neither image_token_id nor "
        "image_token_index: this family is not supported for training"
    )


def merge_vision(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join processor outputs of several samples along dimension 0.

    Other dimensions are padded with zeros at their end (LLaVA-NeXT: tiles per image, whose real
    number follows from `image_sizes`).
    """
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _join([part[name] for part in parts if name in part]) for name in names}


def _join(tensors: Sequence[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [want - have for want, have in zip(shape, tensor.shape[1:], strict=True)]
        pairs = [amount for gap in reversed(missing) for amount in (0, gap)]
        padded.append(F.pad(tensor, pairs) if any(pairs) else tensor)
    return torch.cat(padded)


@contextmanager
def _input_embeddings(language_model: Any) -> Iterator[list[Tensor]]:
    """Collect what goes into the language model: embeddings with image features scattered in."""
    found: list[Tensor] = []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(kwargs["inputs_embeds"].detach())

    handle = language_model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def _load_model(folder: str | Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        return AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=Path(folder).is_dir(),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ViSpecError(
            f"target.model {str(folder)!r} cannot be loaded ({first_line(error)}): give a "
            "complete vision-language model with safetensors weights"
        ) from error


def _check_structure(model: Any, folder: str | Path) -> None:
    head = model.get_output_embeddings()
    inner = getattr(getattr(model, "model", None), "language_model", None)
    if inner is None or head is None:
        raise ViSpecError(
            f"target.model {str(folder)!r} ({model.config.model_type}) has no "
            "model.language_model with an lm_head: this family is not supported for training"
        )
    if getattr(head, "bias", None) is not None:
        raise ViSpecError(
            f"target.model {str(folder)!r} ({model.config.model_type}) has a bias in lm_head, "
            "which drafts cannot share: this family is not supported for training"
        )
