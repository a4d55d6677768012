"""The draft's attention: vLLM's own backends, with some rows of the cache made invisible.

Dropping an image's tokens while the rest keep their positions equals masking them.  The draft
keeps the target's slots, one per token, and the layer's head is a few channels wider than its
weights: every query holds a constant there, a hole's key holds the negative of it, all other keys
hold zero.  A hole's softmax weight is then exactly zero on any backend, cached, paged or captured.

Shapes: T tokens, H heads, K key/value heads, h head size, P padded head size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from vllm.config import CacheConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.selector import get_attn_backend

from vllm_vispec.engine.adaptor import MASK_CHANNEL, RowTable
from vllm_vispec.errors import ViSpecError

# Below exp(-104) float32 has nothing left; the margin covers real logits of several hundred.
MIN_MASK_LOGIT = 1000.0
HEAD_SIZE_STEP = 8
MAX_EXTRA_CHANNELS = 128


def mask_logit(head_dim: int, num_channels: int) -> float:
    """Return how far a hole's logit lies below the others'."""
    return float(num_channels * MASK_CHANNEL**2 * head_dim**-0.5)


def padded_head_size(head_dim: int, kv_cache_dtype: str) -> int:
    """Return the smallest head size above ``head_dim`` that an attention backend serves.

    Raises:
        ViSpecError: If there is none.
    """
    for size in range(head_dim + HEAD_SIZE_STEP, head_dim + MAX_EXTRA_CHANNELS + 1, HEAD_SIZE_STEP):
        if mask_logit(head_dim, size - head_dim) < MIN_MASK_LOGIT:
            continue
        try:
            backend = get_attn_backend(
                size, torch.get_default_dtype(), kv_cache_dtype, attn_type=AttentionType.DECODER
            )
        except (ValueError, NotImplementedError):
            continue
        if backend.supports_head_size(size):
            return size
    raise ViSpecError(
        f"no attention backend here serves a head size above the draft's {head_dim}, which ViSpec "
        'needs to mask image rows; set "attention_backend": "TRITON_ATTN" in the speculative config'
    )


class HoleMaskedAttention(nn.Module):
    """Drop-in for vLLM's ``LlamaAttention`` that hides the rows the table marks as holes.

    Args:
        rows: The draft's row table; says which tokens of the batch are holes.
        config: The draft's configuration.
        Others: As ``LlamaAttention`` passes them.
    """

    def __init__(
        self,
        config: LlamaConfig,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        rows: RowTable,
        max_position_embeddings: int = 8192,
        quant_config: QuantizationConfig | None = None,
        bias: bool = False,
        bias_o_proj: bool = False,
        cache_config: CacheConfig | None = None,
        prefix: str = "",
        attn_type: str = AttentionType.DECODER,
    ) -> None:
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        self.rows = rows
        self.head_dim = getattr(config, "head_dim", None) or hidden_size // num_heads
        self.num_heads = num_heads // tp_size
        self.num_kv_heads = max(1, num_kv_heads // tp_size)
        self.q_size = self.num_heads * self.head_dim
        self.kv_size = self.num_kv_heads * self.head_dim
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            self.head_dim,
            num_heads,
            num_kv_heads,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            num_heads * self.head_dim,
            hidden_size,
            bias=bias_o_proj,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=max_position_embeddings,
            rope_parameters=getattr(config, "rope_parameters", None),
            is_neox_style=True,
        )
        kv_cache_dtype = cache_config.cache_dtype if cache_config else "auto"
        padded_size = padded_head_size(self.head_dim, kv_cache_dtype)
        self.num_extra = padded_size - self.head_dim
        self.attn = Attention(
            self.num_heads,
            padded_size,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            attn_type=attn_type,
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Attend over the visible rows; ``[T, D]`` in, ``[T, D]`` out."""
        num_tokens = hidden_states.shape[0]
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        mask_T11 = self.rows.key_mask_of(num_tokens)
        mask_TKm = mask_T11.expand(-1, self.num_kv_heads, self.num_extra)
        pad = (0, self.num_extra)
        q_THP = F.pad(q.view(num_tokens, self.num_heads, self.head_dim), pad, value=MASK_CHANNEL)
        k_TKP = torch.cat((k.view(num_tokens, self.num_kv_heads, self.head_dim), mask_TKm), dim=-1)
        v_TKP = F.pad(v.view(num_tokens, self.num_kv_heads, self.head_dim), pad)
        out = self.attn(q_THP.flatten(1), k_TKP.flatten(1), v_TKP.flatten(1))
        out_THh = out.view(num_tokens, self.num_heads, -1)[..., : self.head_dim]
        output, _ = self.o_proj(out_THh.reshape(num_tokens, self.q_size))
        return output
