"""The ViSpec draft (dialect "reference"), batched for training with multi-step rollouts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .model import EPS, Mlp, RMSNorm, TargetConfig, rotate

NUM_Q = 2


@dataclass(frozen=True)
class DraftConfig:
    """Sizes of the head; attention is full multi-head."""

    vocab_size: int
    hidden: int
    heads: int
    mlp: int
    rope_theta: float = 10000.0

    @classmethod
    def of(cls, c: TargetConfig) -> DraftConfig:
        return cls(c.vocab_size, c.hidden, c.heads, c.mlp, c.rope_theta)

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class ImgAdaptor(nn.Module):
    """Learned queries over the image embeddings: NUM_Q rows per image."""

    def __init__(self, c: DraftConfig) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(NUM_Q, c.heads, c.head_dim))
        self.k_proj = nn.Linear(c.hidden, c.hidden)
        self.v_proj = nn.Linear(c.hidden, c.hidden)
        self.o_proj = nn.Linear(c.hidden, c.hidden, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """[N, tokens, D] -> [N, NUM_Q, D]."""
        heads, dim = self.q.shape[1:]
        k = self.k_proj(image).view(*image.shape[:2], heads, dim).transpose(1, 2)
        v = self.v_proj(image).view(*image.shape[:2], heads, dim).transpose(1, 2)
        scores = self.q.transpose(0, 1).to(k.dtype) @ k.transpose(-1, -2) * dim**-0.5
        out = (scores.softmax(-1) @ v).transpose(1, 2)
        return self.o_proj(out.reshape(image.shape[0], NUM_Q, -1))


class DraftAttention(nn.Module):
    """Projections of the decoder layer's attention."""

    def __init__(self, c: DraftConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.q_proj = nn.Linear(c.hidden, c.hidden)
        self.k_proj = nn.Linear(c.hidden, c.hidden)
        self.v_proj = nn.Linear(c.hidden, c.hidden)
        self.o_proj = nn.Linear(c.hidden, c.hidden, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q and k, and v, all [B, heads, L, head_dim]."""
        q, k, v = (
            linear(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class DraftLayer(nn.Module):
    """Decoder layer without input norm."""

    def __init__(self, c: DraftConfig) -> None:
        super().__init__()
        self.self_attn = DraftAttention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden)
        self.mlp = Mlp(c.hidden, c.mlp, bias=False)


@dataclass(frozen=True)
class Rows:
    """Draft rows of a batch after compression, right-padded; one column per kept row.

    `hidden` [B, C, D] is the target's hidden state of the row's position, `embed` the embedding
    of the next token; `compact` marks the image row and `after` the rows behind the image.
    `images` [B] says which samples have one.
    """

    hidden: Tensor
    embed: Tensor
    positions: Tensor
    compact: Tensor
    after: Tensor
    visual: Tensor | None
    images: Tensor


@dataclass
class Rollout:
    """Keys and values of the earlier passes and their mask."""

    keys: list[Tensor]
    values: list[Tensor]


class Draft(nn.Module):
    """Parameter names equal the published head's."""

    def __init__(self, c: DraftConfig) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden)
        self.layers = nn.ModuleList([DraftLayer(c)])
        self.fc = nn.Linear(2 * c.hidden, c.hidden)
        self.img_fc = nn.Linear(2 * c.hidden, c.hidden)
        self.imadpt = ImgAdaptor(c)
        self._init()

    def _init(self) -> None:
        """img_fc starts as [I | 0]; fc as the sum of both inputs; small outputs."""
        eye = torch.eye(self.c.hidden)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.7 * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.img_fc.weight.copy_(
                torch.cat([eye, 0.1 * self.img_fc.weight[:, eye.shape[0] :]], 1)
            )
            self.fc.weight.mul_(0.3).add_(torch.cat([eye, eye], 1))

    def fuse(self, hidden: Tensor, embed: Tensor, glob: Tensor) -> Tensor:
        """Layer input of text rows."""
        fused = self.img_fc(torch.cat([hidden, glob], -1))
        return self.fc(torch.cat([embed, fused], -1))

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Plain RoPE tables [B, 1, L, head_dim]."""
        half = self.c.head_dim // 2
        inv = self.c.rope_theta ** (-torch.arange(half).float() / half)
        angle = positions[..., None].float() * inv
        angle = torch.cat([angle, angle], -1)[:, None]
        return angle.cos().bfloat16(), angle.sin().bfloat16()

    def adapt(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Compact row [B, 1, D] and global feature per row [B, C, D] (zeros without an image)."""
        out = torch.zeros(rows.hidden.shape[0], NUM_Q, self.c.hidden, dtype=rows.hidden.dtype)
        if rows.visual is not None:
            out[rows.images] = self.imadpt(rows.visual).to(out.dtype)
        glob = torch.where(rows.after[..., None], out[:, NUM_Q - 1 :], 0.0)
        return out[:, :1], glob

    def attend(self, q: Tensor, past: Rollout, spec: int) -> Tensor:
        """Pass `spec` (0 = first): real rows up to p - spec, then own chain rows."""
        n, scale = q.shape[2], q.shape[-1] ** -0.5
        blocked = torch.ones(n, n, dtype=torch.bool).triu(1 - spec)
        scores = (q @ past.keys[0].transpose(-1, -2) * scale).masked_fill(blocked, -1e9)
        parts = [scores]
        for j in range(1, spec + 1):
            parts.append((q * _back(past.keys[j], spec - j)).sum(-1, keepdim=True) * scale)
        weight = torch.cat(parts, -1).softmax(-1)
        out = weight[..., :n] @ past.values[0]
        for j in range(1, spec + 1):
            column = weight[..., n + j - 1 : n + j]
            out = out + column * _back(past.values[j], spec - j)
        return out

    def forward(self, rows: Rows, passes: int) -> list[Tensor]:
        """Output of every pass; pass s+1 reads the shifted output of pass s."""
        cos, sin = self.rope(rows.positions)
        compact, glob = self.adapt(rows)
        layer, past, outs = self.layers[0], Rollout([], []), []
        hidden = rows.hidden
        for spec in range(passes):
            x = self.fuse(hidden, rows.embed, glob)
            if spec == 0:
                x = torch.where(rows.compact[..., None], compact.to(x.dtype), x)
            q, k, v = layer.self_attn.project(x, cos, sin)
            past.keys.append(k)
            past.values.append(v)
            a = self.attend(q, past, spec).transpose(1, 2).flatten(2)
            x = x + layer.self_attn.o_proj(a)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            outs.append(x)
            hidden = torch.cat([rows.hidden[:, :1], x[:, :-1].to(rows.hidden.dtype)], 1)
        return outs


def _back(x: Tensor, steps: int) -> Tensor:
    """Value of the row `steps` columns earlier (columns without one keep zeros)."""
    if steps == 0:
        return x
    return torch.cat([torch.zeros_like(x[:, :, :steps]), x[:, :, :-steps]], 2)


def head_config(c: DraftConfig, max_positions: int, ids: dict[str, int]) -> dict:
    """Flat config.json in the style of the published heads."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "hidden_act": "silu",
        "hidden_size": c.hidden,
        "initializer_range": 0.02,
        "intermediate_size": c.mlp,
        "max_position_embeddings": max_positions,
        "max_window_layers": 1,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": c.heads,
        "num_hidden_layers": 1,
        "num_key_value_heads": c.heads,
        "qkv_bias": True,
        "rms_norm_eps": EPS,
        "rope_theta": c.rope_theta,
        "sliding_window": max_positions,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": c.vocab_size,
    }


def save_head(draft: Draft, folder: Path, config: dict) -> None:
    """Write the head in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in draft.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_head(folder: Path) -> Draft:
    """Read a saved head (bf16, evaluation mode)."""
    raw = json.loads((folder / "config.json").read_text())
    config = DraftConfig(
        raw["vocab_size"],
        raw["hidden_size"],
        raw["num_attention_heads"],
        raw["intermediate_size"],
        raw["rope_theta"],
    )
    draft = Draft(config)
    draft.load_state_dict(load_file(folder / "model.safetensors"))
    return draft.bfloat16().eval()
