"""What `vispec doctor` finds out. Everything heavy is imported on use."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from typing import TYPE_CHECKING

from vllm_vispec import __version__, plugin

if TYPE_CHECKING:
    from vllm_vispec.head_config import HeadConfig

_RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_MIB = 1 << 20


@dataclass(frozen=True)
class Report:
    """Lines to print, and whether ViSpec can work here."""

    lines: tuple[str, ...]
    ok: bool


def run_checks() -> Report:
    """Versions, runner and patch points of this environment."""
    lines = [f"{'vllm-vispec':14} {__version__}", f"{'python':14} {platform.python_version()}"]
    for package in ("torch", "transformers"):
        lines.append(f"{package:14} {_version(package)}")
    if importlib.util.find_spec("vllm") is None:
        lines.append(f"{'vllm':14} not installed: install vLLM ({plugin.supported_range()})")
        return Report(tuple(lines), ok=False)
    vllm_line, version_ok = _vllm_line()
    lines += [vllm_line, f"{'runner':14} {runner_line()}", f"{'trees':14} {tree_line()}"]
    point_lines, points_ok = _patch_point_lines()
    return Report((*lines, "", *point_lines), ok=version_ok and points_ok)


def runner_line() -> str:
    """Which model runner vLLM will use here, and who decides."""
    stated = os.environ.get(_RUNNER_VARIABLE)
    why = f"{_RUNNER_VARIABLE}={stated}" if stated else "default of this platform"
    # Only doctor's own lines are wanted, not what vLLM logs on the way.
    logging.disable(logging.WARNING)
    try:
        from vllm.config import VllmConfig

        chosen = "V2" if VllmConfig().use_v2_model_runner else "V1"
    # vLLM refuses a runner that cannot work here; other failures are not ours to tell apart.
    except Exception as error:
        return f"none: vLLM's default configuration fails here ({why}): {_first_reason(error)}"
    finally:
        logging.disable(logging.NOTSET)
    return f"{chosen} ({why})"


def tree_line(head_size: int = 128) -> str:
    """What attention heads of the usual size become with draft trees, on this machine."""
    logging.disable(logging.WARNING)
    try:
        import torch
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.utils.torch_utils import set_default_torch_dtype

        from vllm_vispec.engine.padded_heads import BackendFinder, choose_padded_head
        from vllm_vispec.tree.codes import num_channels
        from vllm_vispec.tree.settings import TreeSettings

        channels = num_channels(TreeSettings().levels, TreeSettings().top_k)
        with set_current_vllm_config(VllmConfig()), set_default_torch_dtype(torch.bfloat16):
            finder = BackendFinder.of_layer(1, head_size, head_size**-0.5)
            head = choose_padded_head(finder, head_size, head_size + channels)
    # As for the runner: whatever vLLM says is passed on.
    except Exception as error:
        return f"none: vLLM's default configuration fails here: {_first_reason(error)}"
    finally:
        logging.disable(logging.NOTSET)
    if head is None:
        return f"refused: no attention backend here serves heads of {head_size} + {channels}"
    name = head.backend.get_name()
    return f"heads of {head_size} are padded to {head.size} at the default depth ({name})"


def head_lines(head: str) -> list[str]:
    """What a head is and what it needs.

    Raises:
        ViSpecError: it is no usable head.
    """
    from vllm_vispec.dialects import DIALECTS, inspect_head
    from vllm_vispec.dialects.card import guess_target, serve_command
    from vllm_vispec.dialects.speculators import serving_of_folder

    info = inspect_head(head)
    config, serving = info.config, serving_of_folder(info.folder)
    elements = sum(prod(shape) for shape in info.shapes.values())
    size = elements * _DTYPE_BYTES[info.dtype] / _MIB
    facts = {
        "head": head,
        "dialect": f"{info.dialect}: {DIALECTS[info.dialect].summary}",
        "target type": config.target_model_type or "not stated",
        "hidden size": _width(config),
        "vocabulary": f"{config.vocab_size} (the target's must be the same)",
        "kind": f"images compressed {_yes(config.compress)}, "
        f"global feature {_yes(config.global_feature)}",
        "compressor": f"{config.compressor_spec}" if config.compress else "none",
        "query tokens": _queries(config),
        "attention": f"{config.num_attention_heads} heads, {config.num_key_value_heads} KV heads, "
        f"head size {config.head_dim}, RoPE base {config.rope_theta:g}",
        "positions": f"up to {config.max_position_embeddings}",
        "norms": f"input {_yes(config.layer0_input_norm)}, final {_yes(config.final_norm)}",
        "biases": f"q/k/v {_yes(config.qkv_bias)}, fc {_yes(config.fc_bias)}",
        "embeddings": "its own" if config.has_embed_tokens else "the target's",
        "weights": f"{size:.1f} MiB as {info.dtype} in {len(info.files)} file(s)",
        "serve with": f"vllm serve {head} (target: {serving.target})"
        if serving
        else serve_command(guess_target(config), head),
    }
    return [f"{name:14} {value}" for name, value in facts.items()]


def _width(config: HeadConfig) -> str:
    if config.is_draft_vlm:
        return (
            f"{config.hidden_size} in {config.num_hidden_layers} layer(s), a draft VLM for image "
            f"embeddings of {config.vision_size} (the target's hidden size must be the same)"
        )
    return f"{config.hidden_size} (the target's must be the same)"


def _queries(config: HeadConfig) -> str:
    if not config.compress:
        return "no image is compressed"
    if config.has_compressor:
        return "1, the global feature's" if config.has_adaptor else "no image adaptor"
    return f"{config.num_query_tokens} ({config.rows_per_image} rows per image)"


def _vllm_line() -> tuple[str, bool]:
    found = plugin.installed_version()
    problem = plugin.version_problem(found)
    if problem is not None:
        return f"{'vllm':14} {found}: refused, {problem}", False
    state = "supported"
    numbers = found.split(".")[:2]
    if all(part.isdigit() for part in numbers) and tuple(map(int, numbers)) > plugin.MAX_VERSION:
        state = "newer than tested"
    return f"{'vllm':14} {found} ({state}; tested: {plugin.supported_range()})", True


def _patch_point_lines() -> tuple[list[str], bool]:
    from vllm_vispec.compat.check import check_patch_points

    states = check_patch_points()
    broken = [state for state in states if not state.ok]
    lines = [f"{'patch points':14} {len(states) - len(broken)} of {len(states)} fit"]
    for state in states:
        mark = "ok  " if state.ok else "FAIL"
        lines.append(f"  {mark} {state.name}: {state.reason if state.ok else state.detail}")
    if broken:
        lines.append(
            f"ViSpec is disabled here: install vLLM {plugin.supported_range()} "
            "or a newer vllm-vispec"
        )
    return lines, not broken


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _first_reason(error: Exception) -> str:
    """The telling line of an error; pydantic's stands behind "Value error, "."""
    found = re.search(r"Value error, (.*?)(?: \[type=|$)", str(error), re.MULTILINE)
    lines = str(error).splitlines() or [type(error).__name__]
    return found.group(1) if found else lines[0]


def _yes(value: bool) -> str:
    return "yes" if value else "no"
