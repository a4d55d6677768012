"""A folder of tiny targets and of random drafts for them, each built once per test session.

``noise`` scales everything that disturbs the copied embedding: fused hidden states, the global
feature and the decoder layers. More noise means fewer accepted tokens; from about 0.8 on the chain
of steps also amplifies rounding, so that draft logits of two runs differ by over 1e-4.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.more_families import ALL_FAMILIES
from tests.support.tiny_families import DRAFT_VLM_KIND, HEAD_DIM, HIDDEN, TEXT, VOCAB
from tests.support.tiny_models import build_target, build_text_model

if TYPE_CHECKING:
    import torch

KIND = "qwen2_5_vl"
"""The family of most tests."""
GATED: dict[str, Any] = {
    "compressor": "select(prune:2,pool:4,text_only)",
    "num_query_tokens": 1,
    "checkpoint_format": "canonical",
}
UNCOMPRESSED: dict[str, Any] = {"compress": False, "checkpoint_format": "canonical"}
"""What makes a head of :class:`TinyStore` a gated one, or one without compression."""

_HEAD = {
    "hidden_size": HIDDEN,
    "intermediate_size": TEXT["intermediate_size"],
    "num_attention_heads": TEXT["num_attention_heads"],
    "num_key_value_heads": TEXT["num_attention_heads"],
    "num_query_tokens": 2,
    "qkv_bias": True,
    "fc_bias": True,
}
# Narrower than its target.
_DRAFT_VLM = DRAFT_VLM_KIND | {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vision_size": HIDDEN,
}
# The gate's weights, in units of a normal start: large enough that prompts differ in what it says.
_GATE_SCALE = 3.0
# Of the layers, whose outputs are added to the copied embedding.
_OUTPUTS = (".o_proj.weight", ".down_proj.weight")


@dataclass(frozen=True)
class TinyStore:
    """Builds on first use below ``root``; safe to share between tests and child processes."""

    root: Path

    def target(self, kind: str = KIND, seed: int = 0) -> Path:
        """Return the folder of the tiny target of family ``kind``."""
        return build_target(kind, self.root / f"{kind}-{seed}", seed)

    def sibling(
        self, kind: str = KIND, seed: int = 5, vision: dict[str, Any] | None = None, **text: Any
    ) -> str:
        """Return the folder of a smaller model of the family.

        ``text`` changes the sizes of its language model, ``vision`` those of its tower.
        """
        sizes = {
            "hidden_size": 96,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
        } | text
        name = hashlib.sha256(repr([sizes, vision, seed]).encode()).hexdigest()[:12]
        folder = self.root / f"sibling-{kind}-{name}"
        return str(build_target(kind, folder, seed, sizes, vision))

    def text_model(self, kind: str = KIND) -> str:
        """Return the folder of a language model with the family's tokenizer."""
        return str(build_text_model(kind, self.root / f"text-{kind}"))

    def head(self, kind: str = KIND, checkpoint_format: str = "reference", **changes: Any) -> str:
        """Return the folder of a head for that target.

        ``changes`` are ``noise``, ``seed`` and fields of ``HeadConfig``. Heads without compression
        or global feature, or with a compressor of another kind, exist in the canonical format only.
        """
        norms = dict.fromkeys(("layer0_input_norm", "final_norm"), checkpoint_format == "automodel")
        return self._draft(kind, checkpoint_format, 1000, _HEAD | norms, changes)

    def draft_vlm(self, kind: str = KIND, **changes: Any) -> str:
        """Return the folder of a draft VLM; ``changes`` are those of :meth:`head`."""
        return self._draft(kind, "canonical", 2000, _DRAFT_VLM, changes)

    def _draft(
        self,
        kind: str,
        checkpoint_format: str,
        first_seed: int,
        base: dict[str, Any],
        changes: dict[str, Any],
    ) -> str:
        """Write random tensors around what is the target's.

        A draft VLM sees the target's embedding and lm_head through one random map to fewer
        dimensions: rows stay nearly orthogonal, so that each token still votes for its successor.
        """
        name = f"{kind}-{checkpoint_format}-{first_seed}-{sorted(changes.items())}"
        folder = self.root / re.sub(r"\W+", "_", name)
        if (folder / "model.safetensors").exists():
            return str(folder)
        import torch
        from safetensors.torch import load_file

        from tests.support.heads import write_tensors
        from vllm_vispec.heads.config import HeadConfig
        from vllm_vispec.heads.families import embedding_scale
        from vllm_vispec.reference import tensor_shapes

        settings = {"noise": 0.6, "seed": 0, **base, **changes}
        noise, seed = settings.pop("noise"), settings.pop("seed")
        text = ALL_FAMILIES[kind].settings["text_config"]
        config = HeadConfig(
            target_model_type=kind,
            head_dim=HEAD_DIM,
            vocab_size=VOCAB,
            max_position_embeddings=TEXT["max_position_embeddings"],
            rope_theta=text["rope_parameters"].get("rope_theta", 1e4),
            rms_norm_eps=text["rms_norm_eps"],
            **settings,
        )
        generator = torch.Generator().manual_seed(seed + first_seed)
        tables = load_file(self.target(kind) / "model.safetensors")
        narrowing = torch.randn(HIDDEN, config.hidden_size, generator=generator) * HIDDEN**-0.5
        tensors = {}
        for name, shape in tensor_shapes(config).items():
            if name in ("embed_tokens.weight", "lm_head.weight"):
                table = next(tensor for key, tensor in tables.items() if key.endswith(name))
                # A table of its own holds what tokens become, as those that training writes.
                table = table * (embedding_scale(kind, HIDDEN) if "embed" in name else 1)
                tensors[name] = table @ narrowing if config.is_draft_vlm else table
            else:
                tensors[name] = _random_tensor(name, shape, noise, generator)
        write_tensors(folder, checkpoint_format, config, tensors)
        return str(folder)


def _random_tensor(
    name: str, shape: tuple[int, ...], noise: float, generator: torch.Generator
) -> torch.Tensor:
    import torch

    random = torch.randn(shape, generator=generator)
    if name.startswith("compressor."):
        return random * shape[-1] ** -0.5 * (_GATE_SCALE if ".gate." in name else 1)
    if name.endswith("query"):
        return random
    if name.endswith("norm.weight"):
        return 1 + 0.1 * random
    if name.endswith("bias"):
        return 0.1 * random
    if name in ("fc.weight", "img_fc.weight"):
        scale = shape[0] ** -0.5 * (noise if name == "fc.weight" else 1)
        return torch.cat([torch.eye(shape[0]), random[:, shape[0] :] * scale], dim=1)
    is_output = name.startswith("layer") and name.endswith(_OUTPUTS)
    return random * shape[1] ** -0.5 * (noise if is_output else 1)


def with_compressor(draft: Path, folder: Path, text: str) -> Path:
    """Write the ViSpec head ``draft`` with the random compressor ``text`` in place of its adaptor.

    The adaptor's last query stays, for the global feature. Returns ``folder``.
    """
    import torch

    from tests.support.heads import write_tensors
    from vllm_vispec.heads.folder import inspect_head, iter_canonical_tensors
    from vllm_vispec.reference import tensor_shapes

    head = replace(inspect_head(draft).config, compressor=text, num_query_tokens=1)
    tensors = dict(iter_canonical_tensors(inspect_head(draft)))
    tensors["img_adaptor.query"] = tensors["img_adaptor.query"][-1:].clone()
    generator = torch.Generator().manual_seed(0)
    tensors |= {
        name: _random_tensor(name, shape, 1.0, generator)
        for name, shape in tensor_shapes(head).items()
        if name.startswith("compressor.")
    }
    write_tensors(folder, "canonical", head, tensors)
    return folder
