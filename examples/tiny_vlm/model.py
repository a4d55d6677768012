"""Lean training model with the maths and (saved) names of Hugging Face Qwen2.5-VL."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .canvas import GRID

EPS = 1e-6


@dataclass(frozen=True)
class TargetConfig:
    """Sizes of the target.

    `vision_window` is the side, in pixels, of the windows that the vision tower attends to, 0 for
    whole images. One window holds all of a training image.
    """

    vocab_size: int = 1024
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 704
    layers: int = 6
    rope_theta: float = 10000.0
    mrope_section: tuple[int, int, int] = (8, 12, 12)
    vision_depth: int = 3
    vision_hidden: int = 128
    vision_heads: int = 4
    vision_mlp: int = 256
    vision_window: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class RMSNorm(nn.Module):
    """RMSNorm computed in fp32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
        return (y * self.weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE; x [..., L, D], cos/sin broadcastable."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


@lru_cache(maxsize=64)
def causal_mask(n: int) -> Tensor:
    """Additive causal mask."""
    return torch.full((n, n), -1e9).triu(1).bfloat16()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Plain attention: on CPU its backward is faster than the fused kernel's."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + mask
    return scores.softmax(-1) @ v


class Mlp(nn.Module):
    """SiLU-gated MLP."""

    def __init__(self, dim: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, inner, bias=bias)
        self.up_proj = nn.Linear(dim, inner, bias=bias)
        self.down_proj = nn.Linear(inner, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionAttention(nn.Module):
    """Full bidirectional attention over the patches of one image."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[0], cos, sin), rotate(qkv[1], cos, sin)
        out = F.scaled_dot_product_attention(q, k, qkv[2])
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class VisionBlock(nn.Module):
    """Pre-norm block of the vision tower."""

    def __init__(self, c: TargetConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(c.vision_hidden)
        self.norm2 = RMSNorm(c.vision_hidden)
        self.attn = VisionAttention(c.vision_hidden, c.vision_heads)
        self.mlp = Mlp(c.vision_hidden, c.vision_mlp, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


def _patch_positions() -> Tensor:
    """(row, col) of every patch in merge-block order."""
    side = torch.arange(2 * GRID).view(GRID, 2)
    rows = side[:, None, :, None].expand(GRID, GRID, 2, 2)
    cols = side[None, :, None, :].expand(GRID, GRID, 2, 2)
    return torch.stack([rows.reshape(-1), cols.reshape(-1)])


class Vision(nn.Module):
    """Vision tower and merger for GRID x GRID images."""

    def __init__(self, c: TargetConfig) -> None:
        super().__init__()
        self.patch = nn.Linear(3 * 14 * 14, c.vision_hidden, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.vision_depth))
        self.ln_q = RMSNorm(c.vision_hidden)
        wide = 4 * c.vision_hidden
        self.merge = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, c.hidden))
        half = c.vision_hidden // c.vision_heads // 2
        inv = 1.0 / (10000.0 ** (torch.arange(0, half, 2) / half))
        angle = torch.cat([p[:, None] * inv for p in _patch_positions()], dim=-1)
        angle = torch.cat([angle, angle], dim=-1)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, patches, 588] -> [B, GRID*GRID, hidden]."""
        x = self.patch(patches)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.ln_q(x)
        return self.merge(x.reshape(x.shape[0], GRID * GRID, -1))


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, c: TargetConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: list[Tensor] | None, mask: Tensor | None
    ) -> Tensor:
        b, n, _ = x.shape
        q = rotate(self.q_proj(x).view(b, n, -1, self.c.head_dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(b, n, -1, self.c.head_dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(b, n, -1, self.c.head_dim).transpose(1, 2)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = [k, v]
        groups = self.c.heads // self.c.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = attend(q, k, v, causal_mask(n) if mask is None else mask)
        return self.o_proj(out.transpose(1, 2).reshape(b, n, -1))


class Layer(nn.Module):
    """Text decoder layer."""

    def __init__(self, c: TargetConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden)
        self.post_attention_layernorm = RMSNorm(c.hidden)
        self.self_attn = Attention(c)
        self.mlp = Mlp(c.hidden, c.mlp, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: list[Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Target(nn.Module):
    """Vision tower, text decoder, head."""

    def __init__(self, c: TargetConfig) -> None:
        super().__init__()
        self.c = c
        self.visual = Vision(c)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden)
        self.lm_head = nn.Linear(c.hidden, c.vocab_size, bias=False)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, Layer):
            for out in (module.self_attn.o_proj, module.mlp.down_proj):
                out.weight.data *= (2 * self.c.layers) ** -0.5

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """M-RoPE tables [B, 1, L, head_dim] from positions [B, 3, L]."""
        half = self.c.head_dim // 2
        inv = self.c.rope_theta ** (-torch.arange(half).float() / half)
        row = torch.repeat_interleave(torch.arange(3), torch.tensor(self.c.mrope_section))
        angle = positions[:, row].transpose(1, 2).float() * inv
        angle = torch.cat([angle, angle], dim=-1)[:, None]
        return angle.cos().bfloat16(), angle.sin().bfloat16()

    def embed(self, ids: Tensor, visual: Tensor | None, image_mask: Tensor) -> Tensor:
        """Token embeddings with visual tokens scattered in (bf16)."""
        x = self.embed_tokens(ids).bfloat16()
        if visual is not None:
            x = x.masked_scatter(image_mask[..., None], visual.to(x.dtype))
        return x

    def hidden_states(self, x: Tensor, positions: Tensor) -> Tensor:
        """Post-norm hidden states of a right-padded batch."""
        cos, sin = self.rope(positions)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


def grow(target: Target, factor: int) -> Target:
    """Insert factor-1 identity layers after every layer (function preserving)."""
    c = target.c
    deep = Target(TargetConfig(**{**c.__dict__, "layers": c.layers * factor}))
    state = {k: v for k, v in target.state_dict().items() if not k.startswith("layers.")}
    deep.load_state_dict(state, strict=False)
    for i, layer in enumerate(deep.layers):
        if i % factor == 0:
            layer.load_state_dict(target.layers[i // factor].state_dict())
        else:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    return deep
