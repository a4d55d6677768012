"""The draft's attention: vLLM's own backends, with some rows of the cache made invisible.

Dropping an image's tokens while the rest keep their positions equals masking them. The draft keeps
the target's slots, one per token, and the layer's heads are a few channels wider than the head's
weights. There every query holds a constant, a masked position's key holds the negative of it, and
all other keys hold zero. The softmax weight of a masked position is then exactly zero on any
backend, cached, paged or captured. The projections are padded when weights are loaded, so a pass
only adds the keys' mask.

Shapes: T tokens, D hidden size, H heads, K key/value heads, h head size, P padded head size,
E = H * h or K * h.
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

from vllm_vispec.models.padded_heads import BackendFinder, padded_draft_head
from vllm_vispec.models.patch_points import apply_workspace
from vllm_vispec.spec_decode.row_table import MASK_CHANNEL, RowTable
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)


class MaskedAttention(nn.Module):
    """Drop-in for vLLM's ``LlamaAttention`` that hides the positions the row table masks.

    Args:
        rows: The draft's row table; says which tokens of the batch are masked.
        num_branches: Channels behind ``h`` that subclasses use; masking has those behind them.
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
        num_branches: int = 0,
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
        head_dim = getattr(config, "head_dim", None) or hidden_size // num_heads
        self.num_branches = num_branches
        self.num_heads = num_heads // tp_size
        self.num_kv_heads = max(1, num_kv_heads // tp_size)
        layer_settings = {
            "num_kv_heads": self.num_kv_heads,
            "cache_config": cache_config,
            "quant_config": quant_config,
            "prefix": f"{prefix}.attn",
            "attn_type": attn_type,
        }
        scale = head_dim**-0.5
        finder = BackendFinder.of_layer(self.num_heads, head_dim, scale, **layer_settings)
        head = padded_draft_head(finder, head_dim, num_branches)
        apply_workspace(head.backend)
        logger.info(
            "ViSpec draft: attention heads of %d are padded to %d for %s",
            head_dim,
            head.size,
            head.backend.get_name(),
        )
        padded_size = head.size
        self.head_dim, self.padded_size = head_dim, padded_size
        self.q_size, self.kv_size = self.num_heads * padded_size, self.num_kv_heads * padded_size
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            padded_size,
            num_heads,
            num_kv_heads,
            bias=True,  # holds the queries' constant
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            num_heads * padded_size,
            hidden_size,
            bias=bias_o_proj,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        rope_parameters = dict(getattr(config, "rope_parameters", None) or {})
        self.rotary_emb = get_rope(
            padded_size,
            max_position=max_position_embeddings,
            rope_parameters=rope_parameters | {"rope_dim": head_dim},
            is_neox_style=True,
        )
        self.attn = Attention(
            self.num_heads, padded_size, scale, attn_backend=head.backend, **layer_settings
        )
        channels_KP = torch.zeros(self.num_kv_heads, padded_size)
        channels_KP[:, head_dim + num_branches :] = 1.0
        self.key_channels: torch.Tensor
        self.register_buffer("key_channels", channels_KP.view(1, -1), persistent=False)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Attend over the visible rows; ``[T, D]`` in, ``[T, D]`` out."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.add_channels(*self.rotary_emb(positions, q, k))
        # In place: a slice of the projection's output, which nothing else reads.
        k = k.addcmul_(self.rows.key_mask_of(hidden_states.shape[0]), self.key_channels)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output

    def add_channels(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries and keys ``[T, E]`` as they are; subclasses use channels of their own."""
        return q, k

    def pad_weights(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the layer's projections widened from ``h`` to ``P`` channels a head.

        Args:
            weights: ``{q,k,v,o}_proj.weight`` and, where the head has them, ``{q,k,v}_proj.bias``.
        """
        extra = self.padded_size - self.head_dim
        masking = (0, extra - self.num_branches)
        padded: dict[str, torch.Tensor] = {}
        for name, fill in (("q_proj", MASK_CHANNEL), ("k_proj", 0.0), ("v_proj", 0.0)):
            weight_ED = weights[f"{name}.weight"]
            bias_E = weights.get(f"{name}.bias", weight_ED.new_zeros(weight_ED.shape[0]))
            bias_Hh = bias_E.view(-1, self.head_dim)
            weight_HhD = weight_ED.view(-1, self.head_dim, weight_ED.shape[1])
            padded[f"{name}.weight"] = F.pad(weight_HhD, (0, 0, 0, extra)).flatten(0, 1)
            bias_Hh = F.pad(bias_Hh, (0, self.num_branches))
            padded[f"{name}.bias"] = F.pad(bias_Hh, masking, value=fill).flatten()
        out_DE = weights["o_proj.weight"]
        out_DHh = out_DE.view(out_DE.shape[0], -1, self.head_dim)
        padded["o_proj.weight"] = F.pad(out_DHh, (0, extra)).flatten(1)
        return padded
