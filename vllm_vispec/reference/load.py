"""The class of a draft, by its configuration."""

from __future__ import annotations

from pathlib import Path

import torch

from vllm_vispec.heads import inspect_head
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.reference.base import Draft
from vllm_vispec.reference.draft_vlm import DraftVlm
from vllm_vispec.reference.model import ViSpecDraft


def draft_class(config: HeadConfig) -> type[Draft]:
    """What computes a head of this configuration."""
    return DraftVlm if config.is_draft_vlm else ViSpecDraft


def load_draft(folder: str | Path, dtype: torch.dtype = torch.float32) -> Draft:
    """Load a head of any dialect and kind.

    Raises:
        ViSpecError: see `vllm_vispec.heads.inspect_head`.
    """
    return draft_class(inspect_head(folder).config).from_folder(folder, dtype)
