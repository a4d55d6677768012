"""A published model as a draft in vLLM: vLLM's own class of it, with the interface of a draft.

Shapes: T tokens in the batch, N image tokens, D the draft's hidden size, V the target's vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig, replace
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

from vllm_vispec.compat.patching import patch
from vllm_vispec.compressors.compressor import COMPRESSORS
from vllm_vispec.config import ViSpecConfig
from vllm_vispec.draft_model.masking import MaskBuffers
from vllm_vispec.draft_model.published import published_model_config
from vllm_vispec.draft_model.rows import FEATURES, DraftPositions, PublishedRows
from vllm_vispec.models.vispec import draft_hf_config
from vllm_vispec.trees.attention import layers_with
from vllm_vispec.utils.errors import ViSpecError


class EagleDraftModelForCausalLM(nn.Module):
    """Registered architecture; the prefix ``Eagle`` keeps vLLM's configuration from renaming it.

    `model` is the published model; it keeps its own embedding table and lm_head.
    """

    # Asked by vLLM's runners before they make room for embeddings as the draft's input.
    supports_multimodal_embeddings: ClassVar[Literal[True]] = True
    has_own_embed_tokens: ClassVar[Literal[True]] = True
    has_own_lm_head: ClassVar[Literal[True]] = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = draft_hf_config(vllm_config)
        self.vispec_config = ViSpecConfig.from_vllm(vllm_config)
        own = published_model_config(vllm_config)
        own_config = replace(vllm_config, model_config=own, quant_config=None)
        prefix = maybe_prefix(prefix, "draft_model")
        if own_config.quant_config is not None:
            published_names = partial(_with_published_name, f"{prefix}.")
            patch(own_config.quant_config, "get_quant_method", published_names)
        self.image_share = self.vispec_config.image_share
        self.sees_images = self.vispec_config.images != "none"
        self.masks = MaskBuffers(vllm_config) if self.image_share is not None else None
        with layers_with(self.masks):
            self.model = init_vllm_registered_model(own_config, prefix=prefix)
        self.own_vocab_size = own.get_vocab_size()
        text = self.model.get_language_model() if own.is_multimodal_model else self.model
        self._embed_text = text.embed_input_ids
        self.positions: DraftPositions | None = None
        if own.uses_mrope or not self.sees_images:
            max_num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
            num_axes = own.mrope_num_dims if own.uses_mrope else 1
            self.positions = DraftPositions(num_axes, max_num_tokens)
        self._compress = None
        if self.image_share is not None:
            kind = COMPRESSORS[self.image_share.name]
            self._compress = kind(self.image_share, self.config.hidden_size, 1, bias=False)

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor] | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed tokens ``[T]`` with the draft's own image features ``[N, ...]`` in: ``[T, D]``."""
        if self.config.vocab_size > self.own_vocab_size:
            # The target's longer table has rows that are no tokens.
            input_ids = input_ids.clamp(max=self.own_vocab_size - 1)
        if not multimodal_embeddings:
            return self._embed_text(input_ids)
        return self.model.embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one draft pass over tokens at plain positions ``[T]``.

        Without ``inputs_embeds`` ``[T, D]``, tokens are embedded here: the engine takes no images.

        Returns:
            Hidden states ``[T, D]`` for lm_head, and those for the next pass, which reads none.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        if self.positions is not None:
            positions = self.positions(positions)
        hidden_TD = self.model(input_ids=None, positions=positions, inputs_embeds=inputs_embeds)
        return hidden_TD, hidden_TD[:, :0]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return logits ``[T, V]``: rows that only the draft's table has are never drafted."""
        logits: torch.Tensor | None = self.model.compute_logits(hidden_states)
        if logits is None:
            return None
        missing = self.config.vocab_size - logits.shape[-1]
        return F.pad(logits, (0, missing), value=float("-inf")) if missing else logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the published files by the model's own rules; return the names of its weights."""
        return {f"model.{name}" for name in self.model.load_weights(weights)}

    def make_rows(self) -> PublishedRows:
        """Return what lays a batch's rows out for this draft, on either runner."""
        return PublishedRows(self.positions, self.masks, self.image_share)

    def follow_tower(self, target: Any) -> None:
        """Run this model's vision tower wherever the target's runs, on the same tensors.

        Its features hang on the target's: both are kept by image hash, and dropped together.
        """
        if self.sees_images:
            patch(target, "embed_multimodal", self._embed_both)

    def _embed_both(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        theirs = list(original(*args, **kwargs))
        ours = list(self.model.embed_multimodal(*args, **kwargs))
        for their_ND, our_ND in zip(theirs, ours, strict=True):
            if len(their_ND) != len(our_ND):
                raise ViSpecError(
                    f"the draft makes {len(our_ND)} tokens of an image, the target "
                    f"{len(their_ND)}: use a draft with the target's image geometry"
                )
            kept_ND = our_ND if self._compress is None else self._compress([our_ND])
            setattr(their_ND, FEATURES, kept_ND)
        return theirs


def _with_published_name(
    own_prefix: str, original: Callable[..., Any], layer: nn.Module, prefix: str
) -> Any:
    """Stands for a quantisation's ``get_quant_method``, whose lists name layers as published."""
    return original(layer, prefix.removeprefix(own_prefix))
