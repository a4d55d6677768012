"""Writing a head of any dialect as our canonical folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from vllm_vispec import __version__
from vllm_vispec.dialects.load import HeadInfo, inspect_head, iter_canonical_tensors
from vllm_vispec.errors import ViSpecError
from vllm_vispec.head_config import HeadConfig

DEFAULT_NUM_TOKENS = 4
DTYPES = ("float32", "float16", "bfloat16")
_STORED_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# (model_type, hidden_size) -> the public target of that shape.
_KNOWN_TARGETS = {
    ("qwen2_5_vl", 2048): "Qwen/Qwen2.5-VL-3B-Instruct",
    ("qwen2_5_vl", 3584): "Qwen/Qwen2.5-VL-7B-Instruct",
    ("llava", 4096): "llava-hf/llava-1.5-7b-hf",
    ("llava", 5120): "llava-hf/llava-1.5-13b-hf",
    ("llava_next", 4096): "llava-hf/llava-v1.6-vicuna-7b-hf",
    ("llava_next", 5120): "llava-hf/llava-v1.6-vicuna-13b-hf",
}
_MARKER = "config.json"


def guess_target(config: HeadConfig) -> str:
    """The public target such a head belongs to, or the placeholder "TARGET"."""
    return _KNOWN_TARGETS.get((config.target_model_type, config.hidden_size), "TARGET")


def serve_command(target: str, head: str | Path, num_tokens: int = DEFAULT_NUM_TOKENS) -> str:
    """The command that serves a target with a head."""
    speculative = json.dumps(
        {"method": "vispec", "model": str(head), "num_speculative_tokens": num_tokens},
        separators=(",", ":"),
    )
    return f"vllm serve {target} --speculative-config '{speculative}'"


def convert_head(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | None = None,
    target: str | None = None,
    drop_embed_tokens: bool = False,
    overwrite: bool = False,
) -> HeadInfo:
    """Write `source` (a folder of any dialect) as a canonical folder.

    The folder appears whole or not at all: it is written beside the destination and renamed.

    Args:
        dtype: float32, float16 or bfloat16; None keeps the stored one.
        target: named in the model card; None = guess from the head's sizes.
        drop_embed_tokens: leave the embedding table out, vLLM then uses the target's.
        overwrite: replace an existing canonical or empty folder.

    Returns:
        What `inspect_head` says about the folder written.

    Raises:
        ViSpecError: the source is no usable head, or the destination is taken.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ViSpecError(f"--dtype {dtype!r} is not supported: use one of {', '.join(DTYPES)}")
    info = inspect_head(source)
    destination = Path(destination).expanduser().absolute()
    _check_destination(destination, info.folder, overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        config = info.config
        if drop_embed_tokens:
            config = replace(config, has_embed_tokens=False)
        stored = dtype or _STORED_DTYPES[info.dtype]
        _write_weights(info, config, stored, scratch)
        _write_texts(config, stored, target or guess_target(config), destination, scratch)
        inspect_head(scratch)  # never put a folder in place that would not load
        _swap_in(scratch, destination)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return inspect_head(destination)


def _check_destination(destination: Path, source: Path, overwrite: bool) -> None:
    if not destination.exists():
        return
    if destination.resolve() == source.resolve():
        raise ViSpecError(f"destination {destination} is the source: choose another folder")
    if not overwrite:
        raise ViSpecError(f"destination {destination} exists: choose another or add --overwrite")
    # --overwrite deletes the folder, so it must look like one that we wrote.
    if not destination.is_dir():
        raise ViSpecError(f"destination {destination} is a file: choose a folder")
    if any(destination.iterdir()) and not _is_canonical(destination):
        raise ViSpecError(
            f"destination {destination} is no canonical head, --overwrite would delete its files: "
            "choose another folder"
        )


def _is_canonical(folder: Path) -> bool:
    try:
        return "vispec" in json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _write_weights(info: HeadInfo, config: HeadConfig, dtype: str, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch_dtype = getattr(torch, dtype)
    wanted = config.tensor_shapes()
    tensors = {
        name: tensor.to(torch_dtype).contiguous()
        for name, tensor in iter_canonical_tensors(info.folder)
        if name in wanted
    }
    file = folder / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    # Temporary folders and safetensors files are private; servers often run as another user.
    folder.chmod(0o755)
    file.chmod(0o644)


def _write_texts(
    config: HeadConfig, dtype: str, target: str, destination: Path, folder: Path
) -> None:
    content = json.dumps(config.to_config_json(dtype), indent=2) + "\n"
    (folder / _MARKER).write_text(content, encoding="utf-8")
    (folder / "README.md").write_text(
        model_card(config, dtype, target, destination), encoding="utf-8"
    )


def _swap_in(scratch: Path, destination: Path) -> None:
    """Rename, moving an old folder aside first so that a crash loses nothing."""
    if not destination.exists():
        scratch.rename(destination)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old.", dir=destination.parent))
    destination.rename(old / destination.name)
    try:
        scratch.rename(destination)
    except OSError:
        (old / destination.name).rename(destination)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def model_card(config: HeadConfig, dtype: str, target: str, folder: Path) -> str:
    """Markdown text that says what the head is and how to serve it."""
    rows = {
        "target type": config.target_model_type or "not stated",
        "hidden size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "query tokens": f"{config.num_query_tokens} ({config.rows_per_image} draft rows per image)",
        "layer input norm / final norm": f"{config.layer0_input_norm} / {config.final_norm}",
        "own embedding table": config.has_embed_tokens,
        "dtype": dtype,
        "converted from": f"{config.dialect} dialect, by vllm-vispec {__version__}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""# ViSpec head

A draft head for speculative decoding of a vision-language model in vLLM (needs `vllm-vispec`).

    {serve_command(target, folder)}

| | |
|---|---|
{table}
"""
