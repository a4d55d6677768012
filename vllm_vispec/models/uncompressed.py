"""The draft of heads without compression: every image token keeps its row and its embedding.

vLLM's route for multimodal drafts does the rest: it gathers the embeddings of the tokens one ahead
of the target's and calls the draft with ``inputs_embeds``. The layer is plain EAGLE's, with vLLM's
own attention, since no row is hidden.

Shapes: T tokens in the batch, N image tokens, D the draft's hidden size, W the vision tower's.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from vllm.compilation.decorators import support_torch_compile
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_vispec.models.vispec import DraftModel, EagleViSpecForCausalLM


@support_torch_compile
class EmbedsModel(DraftModel):
    """The draft, given embeddings."""

    @property
    def vision_size(self) -> int:
        """Columns of the vision tower's output that the draft reads."""
        return self.head.hidden_size

    def image_inputs(self, vision_NW: torch.Tensor) -> torch.Tensor:
        """Return inputs ``[N, D]`` for image tokens, here the vision tower's output itself."""
        return vision_NW

    def forward(
        self, inputs_embeds: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one draft pass; returns the hidden states for lm_head and for the next step."""
        return self.run(inputs_embeds, positions, hidden_states)


class EagleViSpecEmbedsForCausalLM(EagleViSpecForCausalLM):
    """Registered architecture of heads with ``compress=False``."""

    # Asked by vLLM's runners before they gather embeddings for the draft.
    supports_multimodal_embeddings: ClassVar[Literal[True]] = True
    model_class = EmbedsModel

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor] | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed tokens ``[T]`` and put the vision tower's output in, ``[T, D]``.

        Args:
            multimodal_embeddings: The vision tower's output, ``[N, >= W]`` each; columns beyond W
                (deepstack) are the target's alone.
            is_multimodal: bool ``[T]``, on the host; True where the next of their rows belongs.
        """
        embeds_TD = self.model.embed_tokens(input_ids)
        if multimodal_embeddings:
            size = self.model.vision_size
            vision_NW = torch.cat([item[:, :size] for item in multimodal_embeddings])
            input_ND = self.model.image_inputs(vision_NW.to(embeds_TD.dtype))
            assert is_multimodal is not None
            # The mask lies on the host, so that nobody waits for its number of tokens.
            index_N = async_tensor_h2d(is_multimodal.nonzero().flatten(), embeds_TD.device)
            embeds_TD.index_copy_(0, index_N, input_ND)
        return embeds_TD

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one draft pass.

        Args:
            input_ids: ``[T]``; embedded here where the engine takes no images.
            positions: ``[T]``.
            hidden_states: ``[T, D]``, or without columns for a draft that reads none.
            inputs_embeds: ``[T, D]`` or None.

        Returns:
            Hidden states ``[T, D]`` for lm_head, and those for the next pass.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.model.embed_tokens(input_ids)
        return self.run_model(inputs_embeds, positions, hidden_states)

    def run_model(
        self, inputs_embeds: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the compiled model; see `forward`."""
        return self.model(inputs_embeds, positions, hidden_states)

    def attention_weights(self, canonical: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return nothing: vLLM's attention takes the head's weights as they are."""
        return {}
