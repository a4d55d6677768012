"""A published model as the draft, computed by transformers: measured as it is, or trained.

Tensor names end in their shape: B samples, L tokens, S rows of all samples, N tokens that the draft
sees, M rows of an image that it sees, V vocabulary, D hidden of the draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vllm_vispec.compressors.compressor import COMPRESSORS
from vllm_vispec.compressors.places import wanted_rows
from vllm_vispec.compressors.spec import CompressorSpec
from vllm_vispec.config import read_images
from vllm_vispec.draft_model.named import find_published, sees_images
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.folder import CONFIG, HeadInfo, read_json
from vllm_vispec.reference import Draft, attention_mask, image_mask
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.language_model import is_language_model
from vllm_vispec.train.target import DraftBatch, load_model, model_inputs
from vllm_vispec.utils.errors import ViSpecError

LANGUAGE_PREFIXES = ("model.model.language_model.", "model.lm_head.")
"""Of the names of all weights but the vision tower's and its projector's."""


class PublishedModel(Draft):
    """A Hugging Face model: vision-language with its own vision tower, or text alone.

    Attributes:
        folder: where its files are.
        model: the model, in evaluation mode.
        share: which rows of an image it sees, as `config.read_images` returns it.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        config: HeadConfig,
        share: CompressorSpec | None = None,
    ) -> None:
        super().__init__(config)
        self.folder, self.model, self.compressor = folder, model, None
        self.share = share

    @classmethod
    def load(
        cls,
        info: HeadInfo,
        dtype: torch.dtype = torch.float32,
        setting: str = "--head",
        share: CompressorSpec | None = None,
    ) -> PublishedModel:
        """Load a published model on the CPU.

        Args:
            info: what `draft_model.named.find_published` returned.
            setting: what the user calls it, for messages.
            share: which rows of an image it sees; None: all that it can see.

        Raises:
            ViSpecError: transformers cannot load it, or it is built in another way than targets.
        """
        can_see = sees_images(info)
        model = load_model(info.folder, dtype, setting, can_see)
        return cls(info.folder, model, info.config, share if can_see else read_images("none"))

    def blank(self) -> PublishedModel:
        """Return it as it was published: transformers knows by what it loads how to save it.

        It takes images, as all that are trained do.
        """
        model = load_model(self.folder, torch.float32)
        return type(self)(self.folder, model, self.config, self.share)

    def output_head(self, target_VD: Tensor, token_ids_V: Tensor | None = None) -> Tensor:
        """Return its own lm_head, see `Draft.output_head`."""
        model: Any = self.model
        own_VD: Tensor = model.get_output_embeddings().weight
        return own_VD[: len(target_VD)] if token_ids_V is None else own_VD[token_ids_V]

    def distinct_passes(self, passes: int) -> int:
        """Return 1: the rows of a right chain hold the sequence's tokens, whatever the pass."""
        return 1

    def forward(self, batch: DraftBatch) -> Tensor:
        """Return what lm_head reads [B, L, D]; row p, as in every draft, is token p + 1's.

        Those of tokens that it does not see have no meaning.
        """
        reads_text_alone = self.share is not None and not self.share.amount
        hidden_BLD = self._states_of_text(batch) if reads_text_alone else self._states(batch)
        return F.pad(hidden_BLD[:, 1:], (0, 0, 0, 1))

    def _states(self, batch: DraftBatch) -> Tensor:
        model: Any = self.model
        inputs = model_inputs(model, batch.ids_BL, batch.lengths, batch.vision)
        before: AbstractContextManager[Any] = nullcontext()
        if self.share is not None:
            see_share = partial(_see_share, self.share, batch)
            before = model.model.language_model.register_forward_pre_hook(
                see_share, with_kwargs=True
            )
        with before:
            states_BLD: Tensor = model.model(**inputs, use_cache=False).last_hidden_state
        return states_BLD

    def _states_of_text(self, batch: DraftBatch) -> Tensor:
        model: Any = self.model
        length = batch.ids_BL.shape[1]
        is_token_BL = torch.arange(length) < torch.tensor(batch.lengths)[:, None]
        seen_BL = (is_token_BL & ~image_mask(batch.runs, length)).to(batch.ids_BL.device)
        table_VD = model.get_input_embeddings().weight
        # As in the engine: what a shorter table lacks is never said, only asked.
        ids_BL = batch.ids_BL.clamp(max=len(table_VD) - 1).to(table_VD.device)
        texts = [ids_L[seen_L] for ids_L, seen_L in zip(ids_BL, seen_BL, strict=True)]
        ids_BN = pad_sequence(texts, batch_first=True)
        is_text_BN = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        states_BND = model.model(
            input_ids=ids_BN, attention_mask=is_text_BN, use_cache=False
        ).last_hidden_state
        hidden_BLD = states_BND.new_zeros(*seen_BL.shape, states_BND.shape[-1])
        hidden_BLD[seen_BL] = states_BND[is_text_BN.bool()]
        return hidden_BLD


def _see_share(
    share: CompressorSpec, batch: DraftBatch, _: nn.Module, args: Any, given: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Change what a language model is given so that it sees a share of every image's rows.

    As in the engine, rows keep their places and positions, and the others are masked.
    """
    embeds_BLD = given["inputs_embeds"]
    length = embeds_BLD.shape[1]
    images = [(i * length + a, b - a) for i, runs in enumerate(batch.runs) for a, b in runs]
    is_token_BL = torch.arange(length) < torch.tensor(batch.lengths)[:, None]
    is_seen_BL = is_token_BL & ~image_mask(batch.runs, length)
    for start, size in images:
        is_seen_BL.view(-1)[start + wanted_rows(share, size)] = True
    sees_BLL = attention_mask(is_seen_BL.to(embeds_BLD.device))
    # Scores to be added: not every attention of transformers takes a bool mask.
    mask_BLL = embeds_BLD.new_zeros(sees_BLL.shape)
    mask_BLL.masked_fill_(~sees_BLL, torch.finfo(embeds_BLD.dtype).min)
    shared_SD = _shared(share, embeds_BLD.flatten(0, 1), images)
    changed: dict[str, Any] = {
        "inputs_embeds": shared_SD.view_as(embeds_BLD),
        "attention_mask": mask_BLL[:, None],
    }
    if levels := given.get("deepstack_visual_embeds"):
        # Of image rows alone, one image behind the other.
        sizes = [size for _, size in images]
        packed = [*zip(accumulate(sizes, initial=0), sizes, strict=False)]
        changed["deepstack_visual_embeds"] = [_shared(share, one, packed) for one in levels]
    return args, given | changed


def _shared(share: CompressorSpec, rows_SD: Tensor, images: Sequence[tuple[int, int]]) -> Tensor:
    """Return rows in which those that are seen of images (start, size) hold what is seen."""
    shared_SD = rows_SD.clone()
    compress = COMPRESSORS[share.name](share, rows_SD.shape[1], 1, bias=False)
    for start, size in images:
        row_M = torch.from_numpy(start + wanted_rows(share, size)).to(rows_SD.device)
        shared_SD[row_M] = compress([rows_SD[start : start + size]])
    return shared_SD


def find_start(config: TrainConfig) -> HeadInfo | None:
    """Return the published model that `head.init_from` of a draft VLM names, None if it names none.

    Raises:
        ViSpecError: it does not fit the target, or a setting does not go with it.
    """
    head = config.head
    # A language model becomes a draft VLM with a projector.
    if head.kind != "draft_vlm" or not head.init_from or is_language_model(head.init_from):
        return None
    info = find_published(head.init_from, config.target.model)
    if info is None:
        return None
    where = f"head.init_from {head.init_from!r} is a published model"
    if read_json(info.folder / CONFIG).get("quantization_config"):
        raise ViSpecError(f"{where} with quantised weights: start from the unquantised one")
    if head.trained == "projector":
        raise ViSpecError(f"{where}, whose projector is trained: set head.trained language_model")
    if config.teacher.mode == "offline":
        raise ViSpecError(
            f"{where}, which reads pixels, and the cache holds none: set teacher.mode online"
        )
    return info
