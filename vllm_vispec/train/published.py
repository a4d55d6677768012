"""A published model as the draft, computed by transformers: measured as it is, or trained.

Tensor names end in their shape: B samples, L tokens, N tokens that the draft sees, V vocabulary, D
hidden of the draft.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vllm_vispec.draft_model.named import find_published, sees_images
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.folder import CONFIG, HeadInfo, read_json
from vllm_vispec.reference import Draft, image_mask
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.target import DraftBatch, load_model, model_inputs
from vllm_vispec.utils.errors import ViSpecError

LANGUAGE_PREFIXES = ("model.model.language_model.", "model.lm_head.")
"""Of the names of all weights but the vision tower's and its projector's."""


class PublishedModel(Draft):
    """A Hugging Face model: vision-language with its own vision tower, or text alone.

    Attributes:
        folder: where its files are.
        model: the model, in evaluation mode.
        sees_images: False: it reads what is left without the tokens of images.
    """

    def __init__(
        self, folder: Path, model: nn.Module, config: HeadConfig, sees_images: bool = True
    ) -> None:
        super().__init__(config)
        self.folder, self.model, self.compressor = folder, model, None
        self.sees_images = sees_images

    @classmethod
    def load(
        cls,
        info: HeadInfo,
        dtype: torch.dtype = torch.float32,
        setting: str = "--head",
        images: bool = True,
    ) -> PublishedModel:
        """Load a published model on the CPU.

        Args:
            info: what `draft_model.named.find_published` returned.
            setting: what the user calls it, for messages.
            images: show it images if it can see them.

        Raises:
            ViSpecError: transformers cannot load it, or it is built in another way than targets.
        """
        can_see = sees_images(info.folder)
        model = load_model(info.folder, dtype, setting, can_see)
        return cls(info.folder, model, info.config, can_see and images)

    def blank(self) -> PublishedModel:
        """Return it as it was published: transformers knows by what it loads how to save it."""
        model = load_model(self.folder, torch.float32, takes_images=sees_images(self.folder))
        return type(self)(self.folder, model, self.config, self.sees_images)

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

        Rows of tokens that it does not see are zero.
        """
        hidden_BLD = self._states(batch) if self.sees_images else self._states_of_text(batch)
        return F.pad(hidden_BLD[:, 1:], (0, 0, 0, 1))

    def _states(self, batch: DraftBatch) -> Tensor:
        model: Any = self.model
        inputs = model_inputs(model, batch.ids_BL, batch.lengths, batch.vision)
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


def find_start(config: TrainConfig) -> HeadInfo | None:
    """Return the published model that `head.init_from` of a draft VLM names, None if it names none.

    Raises:
        ViSpecError: it does not fit the target, or a setting does not go with it.
    """
    head = config.head
    # A language model becomes a draft VLM with a projector.
    if head.kind != "draft_vlm" or not head.init_from or not sees_images(head.init_from):
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
