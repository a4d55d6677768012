"""A published model as the draft, computed by transformers: measured as it is, or trained.

Tensor names end in their shape: B samples, L tokens, V vocabulary, D hidden of the draft.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_vispec.draft_model.named import find_published
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.folder import CONFIG, HeadInfo, read_json
from vllm_vispec.reference import Draft
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.target import DraftBatch, load_model, model_inputs
from vllm_vispec.utils.errors import ViSpecError

LANGUAGE_PREFIXES = ("model.model.language_model.", "model.lm_head.")
"""Of the names of all weights but the vision tower's and its projector's."""


class PublishedModel(Draft):
    """A Hugging Face vision-language model with its own vision tower.

    Attributes:
        folder: where its files are.
        model: the model, in evaluation mode.
    """

    def __init__(self, folder: Path, model: nn.Module, config: HeadConfig) -> None:
        super().__init__(config)
        self.folder, self.model, self.compressor = folder, model, None

    @classmethod
    def load(
        cls, info: HeadInfo, dtype: torch.dtype = torch.float32, setting: str = "--head"
    ) -> PublishedModel:
        """Load a published model on the CPU.

        Args:
            info: what `draft_model.named.find_published` returned.
            setting: what the user calls it, for messages.

        Raises:
            ViSpecError: transformers cannot load it, or it is built in another way than targets.
        """
        return cls(info.folder, load_model(info.folder, dtype, setting), info.config)

    def blank(self) -> PublishedModel:
        """Return it as it was published: transformers knows by what it loads how to save it."""
        return type(self)(self.folder, load_model(self.folder, torch.float32), self.config)

    def output_head(self, target_VD: Tensor, token_ids_V: Tensor | None = None) -> Tensor:
        """Return its own lm_head, see `Draft.output_head`."""
        model: Any = self.model
        own_VD: Tensor = model.get_output_embeddings().weight
        return own_VD[: len(target_VD)] if token_ids_V is None else own_VD[token_ids_V]

    def distinct_passes(self, passes: int) -> int:
        """Return 1: the rows of a right chain hold the sequence's tokens, whatever the pass."""
        return 1

    def forward(self, batch: DraftBatch) -> Tensor:
        """Return what lm_head reads [B, L, D]; row p, as in every draft, is token p + 1's."""
        model: Any = self.model
        inputs = model_inputs(model, batch.ids_BL, batch.lengths, batch.vision)
        hidden_BLD: Tensor = model.model(**inputs, use_cache=False).last_hidden_state
        return F.pad(hidden_BLD[:, 1:], (0, 0, 0, 1))


def find_start(config: TrainConfig) -> HeadInfo | None:
    """Return the published model that `head.init_from` of a draft VLM names, None if it names none.

    Raises:
        ViSpecError: it does not fit the target, or a setting does not go with it.
    """
    head = config.head
    if head.kind != "draft_vlm" or not head.init_from:
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
