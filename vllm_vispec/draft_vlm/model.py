"""A draft VLM in vLLM: a small vision language model of its own beside the target.

It reads the tokens and what the target's vision tower made of the images, and none of the target's
hidden states. vLLM's EAGLE route for multimodal drafts fits but for one thing, a buffer of hidden
states that it hands from pass to pass. For this draft that buffer has no columns.

Shapes: T tokens in the batch, N image tokens, D the draft's hidden size, W the target's (its
vision_size).
"""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.models.uncompressed import EagleViSpecEmbedsForCausalLM
from vllm_vispec.models.vispec import (
    CANONICAL_TO_VLLM,
    DraftDecoderLayer,
    DraftRMSNorm,
    draft_hf_config,
)
from vllm_vispec.reference.modeling_draft_vlm import Projector
from vllm_vispec.spec_decode.row_table import RowTable
from vllm_vispec.spec_decode.step import RowIds

_LM_HEAD = "lm_head.weight"
_WEIGHTS = WeightsMapper(orig_to_new_stacked=CANONICAL_TO_VLLM.orig_to_new_stacked)


@support_torch_compile
class DraftVlmModel(nn.Module):
    """Embedding, projector and decoder layers, given embeddings."""

    # What `DraftRows` asks a draft for: no image has rows of its own, all rows are text.
    adaptor = compressor = fusion = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_id: int = 0) -> None:
        super().__init__()
        self.config = draft_hf_config(vllm_config)
        head = HeadConfig.from_config_json(self.config.to_dict())
        self.head = head
        size = head.hidden_size
        self.embed_tokens = VocabParallelEmbedding(
            head.vocab_size, size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        # Whole on every tensor-parallel rank.
        self.vision_size = head.vision_size
        self.projector = Projector(head.vision_size, size).requires_grad_(False)
        prefixes = [
            maybe_prefix(prefix, f"layers.{layer_id + index}")
            for index in range(head.num_hidden_layers)
        ]
        layers = [DraftDecoderLayer(vllm_config, head, LlamaAttention, name) for name in prefixes]
        self.layers = nn.ModuleList(layers)
        self.norm = DraftRMSNorm(size, eps=head.rms_norm_eps)
        # One row id and no columns: nothing is added to a row.
        max_num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.rows = RowTable(RowIds(1, 1), 0, max_num_tokens)

    def image_inputs(self, vision_NW: torch.Tensor) -> torch.Tensor:
        """Return inputs ``[N, D]`` for image tokens."""
        return self.projector(vision_NW)

    def forward(self, inputs_embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run one draft pass over embeddings ``[T, D]``; return normed hidden states ``[T, D]``."""
        hidden_TD, residual_TD = inputs_embeds, None
        for layer in self.layers:
            hidden_TD, residual_TD = layer(positions, hidden_TD, residual_TD)
        normed_TD, _ = self.norm(hidden_TD, residual_TD)
        return normed_TD


class EagleDraftVlmForCausalLM(EagleViSpecEmbedsForCausalLM):
    """Registered architecture; the prefix ``Eagle`` keeps vLLM's configuration from renaming it."""

    model_class = DraftVlmModel

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        head = self.model.head
        self.lm_head = ParallelLMHead(
            head.vocab_size, head.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if head.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.has_own_embed_tokens = True
        self.has_own_lm_head = True

    def run_model(
        self, inputs_embeds: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the compiled model; the second output has no columns, see the top of this file."""
        hidden_TD = self.model(inputs_embeds, positions)
        return hidden_TD, hidden_TD[:, :0]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load a canonical folder's tensors; the only format that has draft VLMs."""
        canonical = dict(weights)
        lm_head_VD = canonical.pop(_LM_HEAD, None)
        if lm_head_VD is not None:
            self.lm_head.weight_loader(self.lm_head.weight, lm_head_VD)
        AutoWeightsLoader(self.model).load_weights(canonical.items(), mapper=_WEIGHTS)
