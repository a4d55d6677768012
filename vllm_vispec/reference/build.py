"""From a head's configuration to its draft, and to the tensors the head consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.reference.draft import Draft
from vllm_vispec.reference.modeling_draft_vlm import DraftVlm
from vllm_vispec.reference.modeling_vispec import ViSpecDraft


def draft_class(config: HeadConfig) -> type[Draft]:
    """Return the class that computes a head of this configuration."""
    return DraftVlm if config.is_draft_vlm else ViSpecDraft


def tensor_shapes(config: HeadConfig) -> dict[str, tuple[int, ...]]:
    """Return canonical name -> shape of every tensor of such a head. Takes no memory."""
    with torch.device("meta"), _WithoutInit():
        tensors = draft_class(config)(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


class _WithoutInit(TorchFunctionMode):
    """Skips initialization that on the meta device would import all of torch._dynamo (seconds)."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "eye"):
            return kwargs.get("out", kwargs.get("tensor", args[0] if args else None))
        return func(*args, **kwargs)
