"""The vision adaptor inside the engine, and the fused input it contributes to.

Shapes: Q num_query_tokens, N embeddings of one item, D hidden size, H heads, h head size,
T tokens in the batch, E = Q * H, M tokens of a compressor. References like 4.5 are to
docs/reference-semantics.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vllm_vispec.heads.config import HeadConfig


@dataclass(frozen=True)
class AdaptorPartial:
    """Attention of the queries over part of a run, mergeable with the rest of it.

    Attributes:
        log_weight: float32 ``[Q, H]``, log-sum-exp of the scores.
        value: float32 ``[Q, H, h]``, the softmax-weighted values.
    """

    log_weight: torch.Tensor
    value: torch.Tensor


def merge_partials(partials: Sequence[AdaptorPartial]) -> torch.Tensor:
    """Combine partials into the attention over all their embeddings, float32 ``[Q, H, h]``."""
    if len(partials) == 1:
        return partials[0].value
    log_weight_PQH = torch.stack([partial.log_weight for partial in partials])
    share_PQH = log_weight_PQH.softmax(dim=0)
    value_PQHh = torch.stack([partial.value for partial in partials])
    return (share_PQH.unsqueeze(-1) * value_PQHh).sum(dim=0)


class TextFusion(nn.Module):
    """``fc(cat(e, img_fc(cat(h, g))))`` with everything that depends on the image taken out.

    With ``fc = [F_e | F_h]`` and ``img_fc = [W_h | W_g]`` (4.5), the layer input is
    ``F_e e + (F_h W_h) h + F_h (W_g g + b_img) + b_fc``.  The last two terms are one vector per
    image, kept in the row table, so a draft step costs what plain EAGLE's costs.  Products are
    formed in float32.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, 2 * hidden_size), requires_grad=False)
        self.global_weight = nn.Parameter(
            torch.zeros(hidden_size, hidden_size), requires_grad=False
        )
        self.bias = nn.Parameter(torch.zeros(hidden_size), requires_grad=False)

    @torch.no_grad()
    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Take ``fc.*`` and, where the head has one, ``img_fc.*`` in canonical names.

        Loaders hand out tensors on the host; a wide head's products would take it up to a minute.
        """
        device = self.weight.device
        given = {name: tensor.to(device, torch.float32) for name, tensor in weights.items()}
        fc_D2D = given["fc.weight"]
        hidden_size = fc_D2D.shape[0]
        bias_D = given.get("fc.bias", fc_D2D.new_zeros(hidden_size))
        on_embedding_DD, on_hidden_DD = fc_D2D.split(hidden_size, dim=1)
        if "img_fc.weight" in given:
            w_hidden_DD, w_global_DD = given["img_fc.weight"].split(hidden_size, dim=1)
            bias_D = bias_D + on_hidden_DD @ given.get("img_fc.bias", bias_D * 0)
            self.global_weight.copy_(on_hidden_DD @ w_global_DD)
            on_hidden_DD = on_hidden_DD @ w_hidden_DD
        self.weight.copy_(torch.cat((on_embedding_DD, on_hidden_DD), dim=1))
        self.bias.copy_(bias_D)

    def fuse(self, embedding_TD: torch.Tensor, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Return the part of the layer input that depends on the token, ``[T, D]``."""
        return F.linear(torch.cat((embedding_TD, hidden_TD), dim=-1), self.weight)

    def token_input(self, token_MD: torch.Tensor) -> torch.Tensor:
        """Return the layer input ``[M, D]`` of a compressor's tokens: the embedding half alone."""
        size = self.weight.shape[0]
        return F.linear(token_MD.to(self.weight.dtype), self.weight[:, :size])

    def offset(self, global_D: torch.Tensor) -> torch.Tensor:
        """Return the part that depends on the global image feature, ``[D]``."""
        return F.linear(global_D, self.global_weight, self.bias)


class ImageAdaptor(nn.Module):
    """Learned queries over one image's embeddings (4.14).

    Replicated on every tensor-parallel rank: it runs once per image and is small.
    """

    def __init__(self, head: HeadConfig) -> None:
        super().__init__()
        size, self.num_heads = head.hidden_size, head.num_attention_heads
        self.hidden_size, self.head_dim = size, size // head.num_attention_heads
        shape = (head.num_query_tokens, self.num_heads, self.head_dim)
        self.query = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.k_proj = nn.Linear(size, size, bias=head.qkv_bias)
        self.v_proj = nn.Linear(size, size, bias=head.qkv_bias)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.requires_grad_(False)
        self.folded_query: torch.Tensor
        folded_ED = torch.zeros(head.num_query_tokens * self.num_heads, size, dtype=torch.float32)
        self.register_buffer("folded_query", folded_ED, persistent=False)

    @torch.inference_mode()
    def fold_queries(self) -> None:
        """Multiply the queries into the key projection; call it once the weights are loaded.

        A query's score for an embedding is ``q (W_k e) = (q W_k) e``, and the weighted sum of
        ``W_v e`` is ``W_v`` of the weighted sum.  So an image of N tokens costs two products with
        as many rows as there are queries and heads, instead of two with D.  The keys' bias adds the
        same to all scores of a query, which softmax and the merging of partials do not see.
        """
        weight_HhD = self.k_proj.weight.float().view(self.num_heads, self.head_dim, -1)
        query_QHh = self.query.float() * self.head_dim**-0.5
        self.folded_query.copy_(torch.einsum("qhe,hed->qhd", query_QHh, weight_HhD).flatten(0, 1))

    @torch.inference_mode()
    def attend(self, embeddings: torch.Tensor) -> AdaptorPartial:
        """Attend over ``[N, >= D]`` embeddings; columns beyond D (deepstack) are ignored."""
        embeds_ND = embeddings[:, : self.hidden_size].float()
        score_EN = self.folded_query @ embeds_ND.T
        mixed_QHD = (score_EN.softmax(dim=-1) @ embeds_ND).view(
            -1, self.num_heads, self.hidden_size
        )
        value_HhD = self.v_proj.weight.float().view(self.num_heads, self.head_dim, -1)
        value_QHh = torch.einsum("hed,qhd->qhe", value_HhD, mixed_QHD)
        if self.v_proj.bias is not None:
            value_QHh += self.v_proj.bias.float().view(self.num_heads, self.head_dim)
        log_weight_QH = score_EN.logsumexp(dim=-1).view(-1, self.num_heads)
        return AdaptorPartial(log_weight_QH, value_QHh)

    @torch.inference_mode()
    def project(self, value_QHh: torch.Tensor) -> torch.Tensor:
        """Return the image's rows ``[Q, D]``; the last is its global feature, the others tokens."""
        return self.o_proj(value_QHh.flatten(1).to(self.o_proj.weight.dtype))
