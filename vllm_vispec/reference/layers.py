"""Building blocks of the drafts in plain PyTorch.

Sections cited are those of docs/reference-semantics.md. Tensor names end in their shape: B batch,
N query rows, M key rows (cache included), D hidden, H query heads, G key/value heads, K head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_vispec.compressors.compressor import CrossAttention
from vllm_vispec.heads.config import HeadConfig

# Keys after RoPE and values, each [B, G, M, K].
KVCache = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Root mean square norm computed in float32, scaled in the input's dtype."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x_BND: Tensor) -> Tensor:
        """Norm over the last axis; same shape and dtype."""
        wide = x_BND.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x_BND.dtype)


class ImageAdaptor(CrossAttention):
    """ViSpec's learned queries over the raw embeddings of one image run (4.14).

    The last of its output rows is the run's global feature.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(
            config.num_query_tokens,
            config.hidden_size,
            config.num_attention_heads,
            config.qkv_bias,
        )


def apply_rope(x_BHNK: Tensor, positions_BN: Tensor, theta: float) -> Tensor:
    """Plain 1-D rotate-half RoPE (4.7); angles in float32, products in the input's dtype."""
    half = x_BHNK.shape[-1] // 2
    exponents = torch.arange(half, device=x_BHNK.device, dtype=torch.float32) / half
    inverse_frequencies = theta**-exponents
    angles = positions_BN[:, None, :, None].float() * inverse_frequencies
    cos, sin = angles.cos().to(x_BHNK.dtype), angles.sin().to(x_BHNK.dtype)
    first, second = x_BHNK[..., :half], x_BHNK[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Self attention with RoPE, grouped key/value heads and an optional cache."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        self.groups = config.num_attention_heads // config.num_key_value_heads
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(
        self,
        x_BND: Tensor,
        positions_BN: Tensor,
        mask_BNM: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, KVCache]:
        """Attend to the cache and to the rows themselves.

        Args:
            mask_BNM: True where a row may look, or numbers added to scores, -inf where it may not;
                None: causal, the cache's keys first.
            cache: keys and values of earlier rows; not changed, a longer one is returned.
        """
        q_BHNK = apply_rope(self._heads(self.q_proj(x_BND)), positions_BN, self.theta)
        k_BGMK = apply_rope(self._heads(self.k_proj(x_BND)), positions_BN, self.theta)
        v_BGMK = self._heads(self.v_proj(x_BND))
        if cache is not None:
            k_BGMK = torch.cat((cache[0], k_BGMK), dim=2)
            v_BGMK = torch.cat((cache[1], v_BGMK), dim=2)
        if mask_BNM is None:
            mask_BNM = causal_mask(x_BND.shape[1], k_BGMK.shape[2], x_BND.device)[None]
        if mask_BNM.is_floating_point():
            mask_BNM = mask_BNM.to(q_BHNK.dtype)
        out_BHNK = F.scaled_dot_product_attention(
            q_BHNK,
            k_BGMK.repeat_interleave(self.groups, dim=1),
            v_BGMK.repeat_interleave(self.groups, dim=1),
            attn_mask=mask_BNM[:, None],
        )
        return self.o_proj(out_BHNK.transpose(1, 2).flatten(2)), (k_BGMK, v_BGMK)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, N, heads * K] -> [B, heads, N, K]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def causal_mask(rows: int, keys: int, device: torch.device) -> Tensor:
    """Bool [rows, keys]: the last row sees all keys, each row before it one key less."""
    return torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)


def biased_mask(bias_N: Tensor | None, gated_N: Tensor, keys: int) -> Tensor | None:
    """Causal mask [1, rows, keys] to be added to scores; None without biases.

    Args:
        bias_N: biases of the first keys; the keys behind them have none.
        gated_N: bool, rows that a gate's decision applies to.
        keys: number of all keys, those of the rows last.
    """
    if bias_N is None:
        return None
    bias_M = F.pad(bias_N, (0, keys - len(bias_N)))
    sees_NM = causal_mask(len(gated_N), keys, bias_N.device)
    mask_NM = torch.where(gated_N[:, None], bias_M, 0.0).masked_fill(~sees_NM, -torch.inf)
    return mask_NM[None]


class MLP(nn.Module):
    """SiLU-gated MLP without biases."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.down_proj(F.silu(self.gate_proj(x_BND)) * self.up_proj(x_BND))


class DecoderLayer(nn.Module):
    """Llama-style layer whose input norm is optional; the reference has none (4.6)."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps) if config.layer0_input_norm else None
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BND: Tensor,
        positions_BN: Tensor,
        mask_BNM: Tensor | None = None,
        cache: KVCache | None = None,
        wanted_R: Tensor | None = None,
    ) -> tuple[Tensor, KVCache]:
        """Run the layer; see `Attention.forward` and `feed_forward` for the arguments."""
        normed_BND = x_BND if self.input_layernorm is None else self.input_layernorm(x_BND)
        attended_BND, cache = self.self_attn(normed_BND, positions_BN, mask_BNM, cache)
        return self.feed_forward(x_BND + attended_BND, wanted_R), cache

    def feed_forward(self, x_BND: Tensor, wanted_R: Tensor | None = None) -> Tensor:
        """Run what follows attention.

        Args:
            wanted_R: rows whose output is read, each once, as b * N + n; other rows of the result
                have no meaning. None: all.
        """
        if wanted_R is None:
            return x_BND + self.mlp(self.post_attention_layernorm(x_BND))
        rows = x_BND.flatten(0, 1)
        wanted_RD = rows[wanted_R]
        wanted_RD = wanted_RD + self.mlp(self.post_attention_layernorm(wanted_RD))
        return rows.index_copy(0, wanted_R, wanted_RD.to(rows)).view_as(x_BND)
