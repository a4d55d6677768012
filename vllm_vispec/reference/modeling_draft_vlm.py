"""A draft VLM in plain PyTorch: a small vision-language model that drafts on its own.

It reads tokens and the target's image embeddings, never a hidden state of the target. Its rows are
shifted like those of every draft: row p holds token p + 1 at position p and predicts token p + 2.
So prompt token 0 is never read, and every image token keeps its row.

Tensor names end in their shape: B batch, L tokens (= rows), N rows, M keys (cache included), D
hidden of the draft, E image embeddings (the target's hidden size), A image rows of a batch, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.reference.draft import Chain, ChainBuilder, Draft
from vllm_vispec.reference.layers import DecoderLayer, KVCache, RMSNorm
from vllm_vispec.reference.rows import Run
from vllm_vispec.utils.errors import ViSpecError

PROJECTOR_PREFIX = "projector."
"""Of the canonical names of the projector's tensors."""


@dataclass(frozen=True)
class VlmPrefill:
    """State of one sequence after its prompt.

    Attributes:
        layer_in_ND: input rows of the first layer.
        out_ND: output rows behind the final norm; the last one feeds lm_head.
        caches: keys and values of the rows for each layer, each [1, G, N, K].
    """

    layer_in_ND: Tensor
    out_ND: Tensor
    caches: tuple[KVCache, ...]


class Projector(nn.Module):
    """Projects the target's image embeddings to the draft's width, as LLaVA-1.5 does."""

    def __init__(self, vision_size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, image_AE: Tensor) -> Tensor:
        """[..., E] -> [..., D], with the exact GELU between the layers."""
        return self.linear_2(F.gelu(self.linear_1(image_AE)))


class DraftVlm(Draft):
    """A small vision language model as the draft.

    Raises:
        ViSpecError: the configuration is that of a head on the target's states.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        if not config.is_draft_vlm:
            raise ViSpecError(
                "the head is no draft VLM (vision_size 0): load it as what it is, or set "
                "vision_size to the target's hidden size"
            )
        size = config.hidden_size
        self.compressor = None
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.projector = Projector(config.vision_size, size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(size, config.vocab_size, bias=False)
        )

    @property
    def head_VD(self) -> Tensor:
        """Its lm_head: a matrix of its own, or its embedding table."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def output_head(self, target_VD: Tensor, token_ids_V: Tensor | None = None) -> Tensor:
        """Return its own lm_head, see `Draft.output_head`."""
        return self.head_VD if token_ids_V is None else self.head_VD[token_ids_V]

    def distinct_passes(self, passes: int) -> int:
        """Return 1: the rows of a right chain hold the sequence's tokens, whatever the pass."""
        return 1

    def token_inputs(self, ids_BL: Tensor, embeds_BLE: Tensor, image_BL: Tensor) -> Tensor:
        """Return the first layer's input for tokens [B, L, D], not shifted.

        Args:
            ids_BL: int64 token ids.
            embeds_BLE: the TARGET's input embeddings; only those of images are read.
            image_BL: bool, tokens of images.
        """
        own_BLD = self.embed_tokens(ids_BL)
        image_AD = self.projector(embeds_BLE[image_BL])
        return own_BLD.masked_scatter(image_BL[..., None], image_AD.to(own_BLD.dtype))

    def run_layers(
        self,
        x_BND: Tensor,
        positions_BN: Tensor,
        caches: Sequence[KVCache] | None = None,
    ) -> tuple[Tensor, tuple[KVCache, ...]]:
        """Run all layers, causal, and the final norm.

        Args:
            caches: keys and values of earlier rows for each layer; not changed.

        Returns:
            Output rows [B, N, D], and the caches including them.
        """
        longer: list[KVCache] = []
        for index, layer in enumerate(self.layers):
            cache = None if caches is None else caches[index]
            x_BND, cache = layer(x_BND, positions_BN, None, cache)
            longer.append(cache)
        return self.norm(x_BND), tuple(longer)

    def forward(self, ids_BL: Tensor, embeds_BLE: Tensor, runs: Sequence[Sequence[Run]]) -> Tensor:
        """Return the output rows of whole sequences [B, L, D].

        Row p reads tokens 1 to p + 1. Sequences are padded on the right. Ignore the rows from a
        sequence's last token on; no earlier row sees them.

        Args:
            ids_BL: int64 token ids.
            embeds_BLE: the TARGET's input embeddings, image features scattered in.
            runs: images [start, end) of each sequence, in token indices.
        """
        count, total = ids_BL.shape
        image_BL = image_mask(runs, total).to(ids_BL.device)
        shifted_BLD = self.token_inputs(
            F.pad(ids_BL[:, 1:], (0, 1)),
            F.pad(embeds_BLE[:, 1:], (0, 0, 0, 1)),
            F.pad(image_BL[:, 1:], (0, 1)),
        )
        positions_BL = torch.arange(total, device=ids_BL.device).expand(count, -1)
        return self.run_layers(shifted_BLD, positions_BL)[0]

    def prefill(
        self,
        prompt_ids_L: Tensor,
        prompt_embeds_LE: Tensor,
        next_id: int,
        runs: Sequence[Run] = (),
    ) -> VlmPrefill:
        """Draft prefill of one prompt.

        Args:
            prompt_ids_L: int64 token ids.
            prompt_embeds_LE: the TARGET's input embeddings, image features scattered in.
            next_id: the first token the target sampled.
            runs: images [start, end) in prompt indices.
        """
        length = len(prompt_ids_L)
        image_1L = image_mask([runs], length).to(prompt_ids_L.device)
        prompt_1LD = self.token_inputs(prompt_ids_L[None], prompt_embeds_LE[None], image_1L)
        next_D = self.embed_tokens(prompt_ids_L.new_tensor(next_id))
        layer_in_ND = torch.cat((prompt_1LD[0, 1:], next_D[None]))
        positions_N = torch.arange(length, device=prompt_ids_L.device)
        out_BND, caches = self.run_layers(layer_in_ND[None], positions_N[None])
        return VlmPrefill(layer_in_ND, out_BND[0], caches)

    def extend(
        self, ids_N: Tensor, first_position: int, caches: Sequence[KVCache]
    ) -> tuple[Tensor, Tensor, tuple[KVCache, ...]]:
        """Run rows of consecutive text tokens behind the caches.

        Returns:
            Output rows [N, D], layer input [N, D], and the caches including them.
        """
        layer_in_ND = self.embed_tokens(ids_N)
        positions_N = torch.arange(len(ids_N), device=ids_N.device) + first_position
        out_BND, longer = self.run_layers(layer_in_ND[None], positions_N[None], caches)
        return out_BND[0], layer_in_ND, longer

    @torch.no_grad()
    def chain(self, prefill: VlmPrefill, num_tokens: int) -> Chain:
        """Draft `num_tokens` tokens greedily from the end of a prompt, with its own lm_head."""
        last = len(prefill.out_ND) - 1
        chain = ChainBuilder(last, self.head_VD)
        token = chain.add(prefill.out_ND[-1], prefill.layer_in_ND[-1])
        caches: Sequence[KVCache] = prefill.caches
        for position in range(last + 1, last + num_tokens):
            out_ND, layer_in_ND, caches = self.extend(token[None], position, caches)
            token = chain.add(out_ND[-1], layer_in_ND[-1])
        return chain.build()


def image_mask(runs: Sequence[Sequence[Run]], length: int) -> Tensor:
    """Return which tokens are an image's, bool [B, length] on the CPU."""
    mask_BL = torch.zeros(len(runs), length, dtype=torch.bool)
    for row_L, images in zip(mask_BL, runs, strict=True):
        for start, end in images:
            row_L[start:end] = True
    return mask_BL
