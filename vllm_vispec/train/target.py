"""The frozen target in training: what it computes for samples, and padded batches of that.

Tensor names end in their shape: B batch, L tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vllm_vispec.data.encode import Encoded
from vllm_vispec.heads.families import attends_both_ways
from vllm_vispec.heads.target import load_target_config
from vllm_vispec.train.memory import TARGET, explained, is_out_of_memory
from vllm_vispec.train.vision_attention import use_window_attention
from vllm_vispec.utils.errors import ViSpecError, first_line

# Weight files are known by their size and this many blocks of this size, spread evenly.
_BLOCKS, _BLOCK_BYTES = 64, 2**16

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Observed:
    """One sample with what the target computed for it.

    Attributes:
        sample_id: name of the sample in its file.
        family: task family, "" if unknown.
        token_ids: int64 [L], image placeholders expanded.
        answer: bool [L], tokens the assistant wrote, its end-of-turn token included.
        runs: image runs [start, end) in token indices, one per image.
        embeds_LD: the target's input embeddings, image features scattered in.
        hidden_LD: the target's hidden states after its final norm (what lm_head reads).
        vision: the processor's tensors of its images, for a draft with a vision tower of its own.
    """

    sample_id: str
    family: str
    token_ids: Tensor
    answer: Tensor
    runs: Runs
    embeds_LD: Tensor
    hidden_LD: Tensor
    vision: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DraftBatch:
    """Samples padded on the right to a common length L.

    Attributes:
        ids_BL: int64, 0 behind the end of a sample.
        answer_BL: bool, False behind the end.
        embeds_BLD, hidden_BLD: see `Observed`; zeros behind the end.
        runs: image runs of every sample.
        lengths: tokens of every sample.
        families: task family of every sample.
        vision: the processor's tensors of all images, on the CPU.
    """

    ids_BL: Tensor
    answer_BL: Tensor
    embeds_BLD: Tensor
    hidden_BLD: Tensor
    runs: tuple[Runs, ...]
    lengths: tuple[int, ...]
    families: tuple[str, ...]
    vision: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> DraftBatch:
        """The batch on another device, its embeddings and states in another dtype (None: kept)."""
        return replace(
            self,
            ids_BL=self.ids_BL.to(device, non_blocking=True),
            answer_BL=self.answer_BL.to(device, non_blocking=True),
            embeds_BLD=self.embeds_BLD.to(device, dtype, non_blocking=True),
            hidden_BLD=self.hidden_BLD.to(device, dtype, non_blocking=True),
        )


def pad_batch(samples: Sequence[Observed], multiple: int = 1) -> DraftBatch:
    """Pad at least one sample on the right; any number of images each, none included.

    Args:
        multiple: L is one of its multiples. Kernels that are prepared once per shape then meet
            few shapes.
    """
    longest = max(len(sample.token_ids) for sample in samples)
    length = longest + -longest % multiple

    def padded(name: str) -> Tensor:
        rows = [getattr(sample, name) for sample in samples]
        gaps = [(0, 0) * (row.dim() - 1) + (0, length - len(row)) for row in rows]
        return torch.stack([F.pad(row, gap) for row, gap in zip(rows, gaps, strict=True)])

    return DraftBatch(
        ids_BL=padded("token_ids"),
        answer_BL=padded("answer"),
        embeds_BLD=padded("embeds_LD"),
        hidden_BLD=padded("hidden_LD"),
        runs=tuple(sample.runs for sample in samples),
        lengths=tuple(len(sample.token_ids) for sample in samples),
        families=tuple(sample.family for sample in samples),
        vision=merge_vision([sample.vision for sample in samples]),
    )


@dataclass(frozen=True)
class TargetFacts:
    """What training needs to know of the target besides its states.

    Attributes:
        model_type: of the whole model, e.g. "qwen2_5_vl".
        text_config: transformers config of its language model.
        embed_VD, lm_head_VD: its tables, on the run's device, in its dtype.
    """

    model_type: str
    text_config: Any
    embed_VD: Tensor
    lm_head_VD: Tensor


@dataclass(frozen=True)
class TrainingTarget(TargetFacts):
    """A frozen Hugging Face vision-language model.

    Attributes:
        model: the model, in evaluation mode, without gradients.
        folder: where it came from.
        image_token_id: the id of image placeholders.
    """

    model: Any
    folder: str
    image_token_id: int

    @classmethod
    def load(
        cls, folder: str | Path, dtype: torch.dtype, device: str, attention: str = "sdpa"
    ) -> TrainingTarget:
        """Load a target from a local folder (nothing is fetched then) or a hub id.

        Args:
            attention: of transformers.

        Raises:
            ViSpecError: it cannot be read, has no vision part, does not fit the device, or is not
                built as `model.model.language_model` plus `lm_head`.
        """
        config = load_target_config(folder)
        _check_room(folder, dtype, device)
        model = load_model(folder, dtype, attention=attention)
        model.requires_grad_(False)
        model.eval().to(device)
        return cls(
            model_type=str(config.model_type),
            text_config=model.config.get_text_config(),
            embed_VD=embedding_table(model),
            lm_head_VD=model.get_output_embeddings().weight,
            model=model,
            folder=str(folder),
            image_token_id=image_token_id(config),
        )

    def observe(self, samples: Sequence[Encoded]) -> list[Observed]:
        """Run the target on samples, padded on the right. Results equal one by one up to rounding.

        Returns:
            One `Observed` per sample, tensors in the target's dtype and on its device.

        Raises:
            ViSpecError: the processor's image tensors do not fit the model, or memory ran out.
        """
        inputs, device, embeds = self._inputs(samples), self.embed_VD.device, []

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            embeds.append(kwargs["inputs_embeds"])  # image features are scattered in

        reader = language_model(self.model)
        # no_grad, not inference_mode: the draft's backward pass saves these tensors.
        with (
            explained(TARGET, {one.sample_id: len(one.token_ids) for one in samples}),
            torch.no_grad(),
            reader.register_forward_pre_hook(note, with_kwargs=True),
        ):
            try:
                hidden_BLD = self.model.model(**inputs, use_cache=False).last_hidden_state
            except (ValueError, RuntimeError, IndexError) as error:
                if is_out_of_memory(error):
                    raise
                ids = ", ".join(sample.sample_id for sample in samples)
                raise ViSpecError(
                    f"the target {self.folder} fails on the samples {ids} ({error}): use the "
                    "processor that belongs to it"
                ) from error
        return [
            Observed(
                sample_id=sample.sample_id,
                family=sample.family,
                token_ids=sample.token_ids.to(device),
                answer=sample.answer.to(device),
                runs=sample.runs,
                vision=sample.vision,
                embeds_LD=embeds_LD[: len(sample.token_ids)],
                hidden_LD=hidden_LD[: len(sample.token_ids)],
            )
            for sample, embeds_LD, hidden_LD in zip(samples, embeds[0], hidden_BLD, strict=True)
        ]

    def stop(self) -> None:
        """Free what is not torch's own; there is no more to observe."""

    def _inputs(self, samples: Sequence[Encoded]) -> Mapping[str, Any]:
        ids = [sample.token_ids for sample in samples]
        vision = merge_vision([sample.vision for sample in samples])
        lengths = [len(one) for one in ids]
        return model_inputs(self.model, pad_sequence(ids, batch_first=True), lengths, vision)


def takes_token_types(model: Any) -> bool:
    """Whether a model's forward wants to know which tokens are images (M-RoPE)."""
    return "mm_token_type_ids" in inspect.signature(type(model.model).forward).parameters


def model_inputs(
    model: Any, ids_BL: Tensor, lengths: Sequence[int], vision: Mapping[str, Tensor]
) -> Mapping[str, Any]:
    """Return what the forward of a Hugging Face model takes for samples padded on the right.

    Args:
        vision: the processor's tensors of all images, in order.
    """
    from transformers import BatchFeature

    image_id, like = image_token_id(model.config), model.get_input_embeddings().weight
    is_token_BL = torch.arange(ids_BL.shape[1]) < torch.tensor(lengths)[:, None]
    # What stands behind the end must be no image.
    ids_BL = ids_BL.cpu().masked_fill(~is_token_BL, 0 if image_id else 1)
    inputs = {"input_ids": ids_BL, "attention_mask": is_token_BL.long(), **vision}
    if takes_token_types(model):
        inputs["mm_token_type_ids"] = (ids_BL == image_id).to(torch.int32)
    # The dtype is that of floats only.
    return BatchFeature(inputs).to(like.device, dtype=like.dtype, non_blocking=True)


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
    if len(tensors) == 1:
        return tensors[0]  # as it is: pinned, if it was
    rest = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    joined = tensors[0].new_zeros(sum(len(t) for t in tensors), *rest)
    rows = joined.split([len(t) for t in tensors])
    for place, tensor in zip(rows, tensors, strict=True):
        place[tuple(slice(size) for size in tensor.shape)] = tensor
    return joined


def load_model(
    folder: str | Path,
    dtype: torch.dtype,
    setting: str = "target.model",
    takes_images: bool = True,
    shallow: Any = None,
    attention: str = "sdpa",
) -> Any:
    """Load a Hugging Face vision-language model in evaluation mode, on the CPU.

    Args:
        setting: what the user calls it, for messages.
        takes_images: False: it is a text model.
        shallow: its configuration with fewer decoder layers, to leave the other ones out.

    Raises:
        ViSpecError: it cannot be read, is not built as `model.model.language_model` plus
            `lm_head`, or what is left of a quantised one is quantised, too.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    kind = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
    verbosity = logging.get_verbosity()
    if shallow is not None:
        logging.set_verbosity_error()  # or it lists the layers that are left out
    try:
        model, found = kind.from_pretrained(
            folder,
            config=shallow,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=Path(folder).is_dir(),
            attn_implementation=None if attention == "sdpa" else attention,  # not all have it
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ViSpecError(
            f"{setting} {str(folder)!r} cannot be loaded ({first_line(error)}): give a "
            "complete vision-language model with safetensors weights"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    # Scales beside a weight, or another weight in its place.
    modules = dict(model.named_modules())
    quantised = [x for x in found["unexpected_keys"] if x.rpartition(".")[0] in modules]
    if shallow is not None and (found["missing_keys"] or quantised):
        first = min([*found["missing_keys"], *quantised])
        raise ViSpecError(
            f"{setting} {str(folder)!r} is quantised outside its decoder layers ({first}): take "
            "one whose vision tower, embeddings and lm_head are not"
        )
    if takes_images:
        check_structure(model, f"{setting} {str(folder)!r}")
        use_window_attention(model)
        use_published_positions(model)
    return model


def use_published_positions(model: Any) -> None:
    """Sample PaddleOCR-VL's grid of positions at the centres of patches, as vLLM does.

    So does the code that the family was published with; transformers 5.19 lays the grid's corners
    on the image's, which gives other image features.
    """
    for module in model.modules():
        if type(module).__name__ == "PaddleOCRVisionEmbeddings":
            module.interpolation_align_corners = False


def _check_room(folder: str | Path, dtype: torch.dtype, device: str) -> None:
    """Compare the weights of a local folder, by their headers, with the device's free memory."""
    import psutil

    needed = 0
    for file in Path(folder).glob("*.safetensors"):  # none for a hub id
        with suppress(SafetensorError), safe_open(str(file), framework="pt") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
            needed += sum(map(math.prod, shapes)) * dtype.itemsize
    on_gpu = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > free:
        raise ViSpecError(
            f"target.model {str(folder)!r} takes {needed / 1e9:.3g} GB in {dtype}, "
            f"{free / 1e9:.3g} GB are free on {device}: let vLLM store its states, on several "
            "GPUs (teacher.mode=offline, teacher.engine=vllm, teacher.engine_options="
            "'{tensor_parallel_size: 4}')"
        )


def embedding_table(model: Any) -> Tensor:
    """Return what a model's tokens become, [V, D]; Gemma's are scaled behind the look-up."""
    embedding = model.get_input_embeddings()
    scale = getattr(embedding, "embed_scale", None)
    table_VD: Tensor = embedding.weight
    return table_VD if scale is None else table_VD * scale.to(table_VD.dtype)


def language_model(model: Any) -> Any:
    """Return the part of a Hugging Face model that reads text and image features, else None."""
    inner = getattr(model, "model", None)
    # The older families call it text_model.
    return getattr(inner, "language_model", None) or getattr(inner, "text_model", None)


def check_structure(model: Any, name: str) -> None:
    """Refuse a target that is not built as `model.model.language_model` plus `lm_head`.

    Raises:
        ViSpecError: says what is missing.
    """
    head = model.get_output_embeddings()
    if attends_both_ways(model.config):
        raise ViSpecError(
            f"{name} ({model.config.model_type}) attends over images in both directions "
            "(prefix-LM), where no draft can be served: this family is not supported for training"
        )
    if language_model(model) is None or head is None:
        raise ViSpecError(
            f"{name} ({model.config.model_type}) has no "
            "model.language_model with an lm_head: this family is not supported for training"
        )
    if getattr(head, "bias", None) is not None:
        raise ViSpecError(
            f"{name} ({model.config.model_type}) has a bias in lm_head, "
            "which training does not know: this family is not supported for training"
        )
