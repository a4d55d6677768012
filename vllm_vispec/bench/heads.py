"""Heads that are made for a comparison, from a head that is there.

Tensor names end in their shape: V vocabulary, D hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from vllm_vispec.draft_model.named import is_head
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.export import write_json, write_weights
from vllm_vispec.heads.folder import (
    CONFIG,
    DTYPES,
    HeadInfo,
    inspect_head,
    is_vispec_head,
    iter_canonical_tensors,
    read_entries,
    weight_files,
)
from vllm_vispec.heads.location import resolve_head
from vllm_vispec.heads.target import load_target_config
from vllm_vispec.utils.errors import ViSpecError

if TYPE_CHECKING:
    from torch import Tensor

_EMBEDDING = "embed_tokens.weight"

Tensors = dict[str, "Tensor"]


def zeroed_head(head: str, folder: Path) -> str:
    """Write a copy of a head whose vision adaptor puts out zeros; returns its folder.

    Compressed image tokens and global feature are then zero for every image. Sizes, masks and the
    work per image stay as they are.

    Raises:
        ViSpecError: it is no usable head, or has no adaptor.
    """
    info, tensors = _read(head)
    check_has_adaptor(head)
    tensors["img_adaptor.o_proj.weight"].zero_()
    dtype = DTYPES[info.dtype]
    return _write(folder, dtype, info.config.to_config_json(dtype), tensors)


def random_head(head: str, folder: Path) -> str:
    """Write a head of another one's kind and sizes with random weights; returns its folder.

    Raises:
        ViSpecError: it is no usable head.
    """
    import torch

    from vllm_vispec.train.init import new_draft

    info = inspect_head(head)
    dtype = DTYPES[info.dtype]
    tensors = new_draft(info.config, torch.empty(0), 0).state_dict()
    return _write(folder, dtype, info.config.to_config_json(dtype), tensors)


def check_has_adaptor(head: str) -> None:
    """Refuse a head without a vision adaptor as the source of the variant vispec_zeroed.

    Raises:
        ViSpecError: it is no usable head, or has no adaptor.
    """
    if not is_head(head) or not inspect_head(head).config.has_adaptor:
        raise ViSpecError(
            f"--head {head} has no vision adaptor to be zeroed: leave vispec_zeroed out of "
            "--variants"
        )


def plain_eagle_head(head: str, target: str, folder: Path) -> str:
    """Return a head that vLLM's own EAGLE serves.

    A head in EAGLE's layout, or a hub id, is taken as it is. One of ours without adaptor (a head
    of kind "eagle_text") is written in that layout. vLLM's EAGLE has no bias behind `fc`; such a
    bias is moved into an embedding table of the head's own, which changes nothing else.

    Args:
        target: folder or hub id of the target whose embeddings the head shares.

    Raises:
        ViSpecError: the head has parts that EAGLE lacks.
    """
    if not Path(head).is_dir() or not is_vispec_head(head):
        return head
    info, tensors = _read(head)
    config = info.config
    if config.has_adaptor or config.layer0_input_norm or config.final_norm:
        raise ViSpecError(
            f"--eagle-head {head} is a ViSpec head with parts that EAGLE lacks: give a head of "
            "kind eagle_text, or one in EAGLE's own layout"
        )
    bias_D = tensors.pop("fc.bias", None)
    if bias_D is not None:
        embedding_VD = tensors.get(_EMBEDDING)
        if embedding_VD is None:
            embedding_VD = target_embedding(target, (config.vocab_size, config.hidden_size))
        tensors[_EMBEDDING] = with_bias(embedding_VD, tensors["fc.weight"], bias_D)
    return _write_eagle(folder, config, DTYPES[info.dtype], tensors)


def write_eagle_head(head: str, target: str, folder: Path) -> str:
    """Write an EAGLE head with the sizes and weights of any ViSpec head; returns its folder.

    Without an image a ViSpec head is an EAGLE head: its two fusions multiply to one. vLLM serves
    the result with its own proposer, so that both can be timed on the same target. What it drafts
    behind an image is worth less; a profile compares steps, not how many there are. So beside a
    draft that is a model of its own stands a random head of the target's width.

    Raises:
        ViSpecError: it is no usable head.
    """
    if not is_head(head) or inspect_head(head).config.is_draft_vlm:
        return _write_random_eagle(target, folder)
    info, source = _read(head)
    tensors = {
        name: tensor
        for name, tensor in source.items()
        # EAGLE's first layer has no input norm.
        if name.startswith("layer.") and "input_layernorm" not in name
    }
    tensors["fc.weight"] = fused_fc(source)
    return _write_eagle(folder, info.config, DTYPES[info.dtype], tensors)


def _write_random_eagle(target: str, folder: Path) -> str:
    import torch

    from vllm_vispec.train.init import new_draft, new_head_config

    text = load_target_config(target, "--target").get_text_config()
    config = new_head_config("eagle_text", text, qkv_bias=False, fc_bias=False)
    tensors = new_draft(config, torch.empty(0), 0).state_dict()
    return _write_eagle(folder, config, "bfloat16", tensors)


def fused_fc(source: Tensors) -> Tensor:
    """Return ``[F_e | F_h W_h]``, ``[D, 2D]``: what ``fc`` and ``img_fc`` do without an image."""
    import torch

    fc_D2D = source["fc.weight"]
    size = fc_D2D.shape[0]
    if "img_fc.weight" not in source:
        return fc_D2D
    on_embedding, on_hidden = fc_D2D.float().split(size, dim=1)
    on_hidden = on_hidden @ source["img_fc.weight"].float()[:, :size]
    return torch.cat((on_embedding, on_hidden), dim=1).to(fc_D2D.dtype)


def with_bias(embedding_VD: Tensor, fc_D2D: Tensor, bias_D: Tensor) -> Tensor:
    """Shift an embedding table so that `fc` without bias puts out what it did with it."""
    import torch

    on_embedding_DD = fc_D2D.double()[:, : fc_D2D.shape[0]]
    shift_D = torch.linalg.lstsq(on_embedding_DD, bias_D.double()[:, None]).solution[:, 0]
    return (embedding_VD.double() + shift_D).to(fc_D2D.dtype)


def target_embedding(target: str, shape: tuple[int, int]) -> Tensor:
    """Read a target's embedding table, [V, D], without its other weights.

    Raises:
        ViSpecError: it has none of this shape.
    """
    for name, entry in read_entries(weight_files(resolve_head(target))).items():
        if name.endswith(_EMBEDDING) and tuple(entry.shape) == shape:
            with safe_open(str(entry.file), framework="pt") as weights:
                return weights.get_tensor(name)
    raise ViSpecError(
        f"--target {target} has no embedding table of {shape[0]} x {shape[1]}: --eagle-head was "
        "trained for another target"
    )


def _read(head: str) -> tuple[HeadInfo, Tensors]:
    info = inspect_head(head)
    return info, dict(iter_canonical_tensors(info))


def _write_eagle(folder: Path, config: HeadConfig, dtype: str, tensors: Tensors) -> str:
    """Write a head in EAGLE's layout, which is no checkpoint format of ours."""
    content = config.to_config_json(dtype)
    del content["vispec"]
    content |= {"architectures": ["LlamaForCausalLM"], "qkv_bias": config.qkv_bias}
    renamed = {name.replace("layer.", "layers.0.", 1): one for name, one in tensors.items()}
    return _write(folder, dtype, content, renamed)


def _write(folder: Path, dtype: str, config: dict[str, Any], tensors: Tensors) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, tensors.items(), dtype)
    write_json(folder / CONFIG, config)
    return str(folder)
