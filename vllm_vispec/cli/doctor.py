"""What `vispec doctor` finds out. Everything heavy is imported on use."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm_vispec import __version__
from vllm_vispec.compat import check as versions
from vllm_vispec.compat import groups
from vllm_vispec.compat.check import PatchPointState, check_points, group_problem
from vllm_vispec.spec_decode.patch_points import CHAINS, CORE
from vllm_vispec.utils.errors import ViSpecError

_RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"


@dataclass(frozen=True)
class Report:
    """Lines to print, and whether ViSpec can work here."""

    lines: list[str]
    ok: bool


def run_checks(*, verbose: bool = False) -> Report:
    """Check versions, runner and patch points of this environment.

    Args:
        verbose: also list all patch points, and say what draft trees make of attention heads. That
            takes some seconds more, as vLLM has to be imported for it.
    """
    lines = [f"{'vllm-vispec':14} {__version__}", f"{'python':14} {platform.python_version()}"]
    for package in ("torch", "transformers"):
        lines.append(f"{package:14} {_version(package)}")
    if importlib.util.find_spec("vllm") is None:
        lines.append(f"{'vllm':14} not installed: install vLLM ({versions.supported_range()})")
        return Report(lines, ok=False)
    vllm_line, version_ok = _vllm_line()
    lines += [vllm_line, f"{'runner':14} {runner_line()}"]
    if verbose:
        lines.append(f"{'trees':14} {tree_line()}")
    point_lines, points_ok = _patch_point_lines(verbose=verbose)
    return Report([*lines, *point_lines], ok=version_ok and points_ok)


def runner_line() -> str:
    """Say which model runner vLLM will use here for a plain configuration, and who decides."""
    stated = os.environ.get(_RUNNER_VARIABLE)
    why = f"{_RUNNER_VARIABLE}={stated}" if stated else "default of this platform"
    try:
        with _quiet():
            from vllm import envs
            from vllm.triton_utils import HAS_TRITON

            asked = envs.VLLM_USE_V2_MODEL_RUNNER
    # Whatever vLLM says is passed on.
    except Exception as error:
        return f"none: vLLM cannot be imported here ({why}): {_first_reason(error)}"
    is_v2 = HAS_TRITON if asked is None else asked
    if is_v2 and not HAS_TRITON:
        return f"none: the V2 model runner needs Triton, which does not serve this machine ({why})"
    return f"{'V2' if is_v2 else 'V1'} ({why})"


def tree_line(head_size: int = 128) -> str:
    """Say what attention heads of the usual size become with draft trees, on this machine."""
    try:
        with _quiet():
            import torch
            from vllm.config import VllmConfig, set_current_vllm_config
            from vllm.utils.torch_utils import set_default_torch_dtype

            from vllm_vispec.models.padded_heads import BackendFinder, choose_padded_head
            from vllm_vispec.trees.settings import TreeSettings

            channels = TreeSettings().num_channels
            with set_current_vllm_config(VllmConfig()), set_default_torch_dtype(torch.bfloat16):
                finder = BackendFinder.of_layer(1, head_size, head_size**-0.5)
                head = choose_padded_head(finder, head_size, head_size + channels)
    # As for the runner: whatever vLLM says is passed on.
    except Exception as error:
        return f"none: vLLM's default configuration fails here: {_first_reason(error)}"
    if head is None:
        return f"refused: no attention backend here serves heads of {head_size} + {channels}"
    name = head.backend.get_name()
    return f"heads of {head_size} are padded to {head.size} at the default depth ({name})"


@contextmanager
def _quiet() -> Iterator[None]:
    """Only doctor's own lines are wanted, not what vLLM logs on the way."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def head_lines(head: str) -> list[str]:
    """Say what a head is and what it needs.

    Raises:
        ViSpecError: it is no usable head.
    """
    from vllm_vispec.heads.card import (
        guess_target,
        head_facts,
        serve_command,
        trained_bounds,
        with_bounds,
    )
    from vllm_vispec.heads.folder import inspect_head
    from vllm_vispec.heads.formats import FORMATS
    from vllm_vispec.heads.speculators import Serving, serving_of_folder

    info = inspect_head(head)
    serving = serving_of_folder(info.folder)
    guessed = Serving(guess_target(info.config))
    bounds = trained_bounds(info.folder)
    size = sum(file.stat().st_size for file in info.files) / (1 << 20)
    return _table(
        {
            "head": head,
            "format": f"{info.checkpoint_format}: {FORMATS[info.checkpoint_format].summary}",
            **head_facts(info.config),
            "weights": f"{size:.1f} MiB as {info.dtype} in {len(info.files)} file(s)",
            "serve with": f"{with_bounds(f'vllm serve {head}', bounds)} (target: {serving.target})"
            if serving
            else serve_command(head, guessed, bounds),
        }
    )


def target_lines(target: str, head: str | None) -> list[str]:
    """Say what a target is, and that the head fits it; reads no weights.

    Args:
        target: a folder or hub id.
        head: a folder or hub id; None: only the target is looked at.

    Raises:
        ViSpecError: the target or the head cannot be read, or they do not fit; says why.
    """
    from vllm_vispec.heads.folder import inspect_head
    from vllm_vispec.heads.target import (
        check_against_target,
        load_target_config,
        tensor_parallel_sizes,
    )

    config = load_target_config(target, "--target")
    text_config = config.get_text_config()
    facts = {
        "target": target,
        "target type": config.model_type,
        "hidden size": text_config.hidden_size,
        "vocabulary": text_config.vocab_size,
        **_family_facts(config),
    }
    if head is not None:
        found = inspect_head(head).config
        warning = check_against_target(
            found, text_config.hidden_size, text_config.vocab_size, config.model_type
        )
        facts["tensor parallel"] = _ranks(tensor_parallel_sizes(found), text_config)
        facts["fit"] = f"yes, but {warning}" if warning else "yes, head and target go together"
    return _table(facts)


def _family_facts(config: Any) -> dict[str, str]:
    """Return a target's row of docs/targets.md, and how to speculate for it."""
    from vllm_vispec.heads.families import find_family, recommend

    family = find_family(config.model_type)
    facts = {"family": "not one that was tested: see docs/targets.md"}
    if family is not None:
        facts = {
            "family": f"{family.name}: {family.sizes}",
            "image tokens": family.image_tokens,
            "positions": family.positions,
            "state": family.state,
            "drafts": family.published_drafts(),
        }
    return {**facts, "recommended": recommend(config)}


def draft_lines(target: str | None, draft: str, max_model_len: int | None = None) -> list[str]:
    """Say that a published model fits a target as its draft, and what it adds; reads no weights.

    Args:
        max_model_len: what the target will be served with; None: all that it can read.

    Raises:
        ViSpecError: no target is given, or the draft does not fit it; says why.
    """
    if target is None:
        raise ViSpecError("--draft is checked against a target: give --target, too")
    with _quiet():
        from vllm_vispec.draft_model import published
        from vllm_vispec.draft_model.fit import size_warning
        from vllm_vispec.heads.card import serve_command
        from vllm_vispec.heads.speculators import Serving
        from vllm_vispec.heads.target import tensor_parallel_sizes

        config = published.read_target(target, max_model_len=max_model_len)
        found = published.find(draft, {}, config)
    if found is None:
        raise ViSpecError(f"--draft {draft} is no model that this vLLM serves: is it a --head?")
    warning = size_warning(found.config, config)
    facts = {
        "draft": draft,
        "adds": published.added_memory(found, config),
        "tensor parallel": _ranks(
            tensor_parallel_sizes(found.config),
            config.hf_text_config,
            published.tower_heads(found.folder),
        ),
        "fit": f"yes, but {warning}" if warning else "yes, draft and target go together",
        "serve with": serve_command(draft, Serving(target))
        + (f" --max-model-len {max_model_len}" if max_model_len else ""),
    }
    return _table(facts)


def _ranks(sizes: list[int], target: Any, tower_heads: int = 0) -> str:
    """Say which of a draft's numbers of ranks divide the heads of its target and its tower, too."""
    heads = target.num_attention_heads, tower_heads
    found = [size for size in sizes if not any(number % size for number in heads)]
    return f"up to {found[-1]} ({', '.join(map(str, found))})"


def _table(facts: Mapping[str, object]) -> list[str]:
    return [f"{name:14} {value}" for name, value in facts.items()]


def _vllm_line() -> tuple[str, bool]:
    found = versions.installed_version()
    problem = versions.version_problem(found)
    if problem is not None:
        return f"{'vllm':14} {found}: refused, {problem}", False
    state = "supported"
    numbers = found.split(".")[:2]
    if all(part.isdigit() for part in numbers) and tuple(map(int, numbers)) > versions.MAX_VERSION:
        state = "newer than tested"
    return f"{'vllm':14} {found} ({state}; tested: {versions.supported_range()})", True


def _patch_point_lines(*, verbose: bool) -> tuple[list[str], bool]:
    """One line if all is well; else what is not available, then a line for each feature and runner.

    Points themselves are listed where one is broken.

    Args:
        verbose: list all of them in any case.

    Returns:
        The lines, and whether ViSpec can work on one of the model runners at least.
    """
    lines, broken, chains_ok = ["patch points in vLLM:"], [], []
    for group in groups.GROUPS:
        states = check_points(group.points)
        misfits = [state for state in states if not state.ok]
        lines.append(
            f"  {'FAIL' if misfits else 'ok':4} {group.title}: "
            f"{len(states) - len(misfits)} of {len(states)} fit"
        )
        lines += [_state_line(state) for state in (states if verbose else misfits)]
        problem = group_problem(group)
        if problem is not None:
            broken.append(problem)
        if group.name == CHAINS.name:
            chains_ok.append(problem is None)
    if not (verbose or broken):
        return [f"{'patch points':14} all {len(groups.unique_points())} in vLLM fit"], True
    problems = [f"not available here: {problem}" for problem in broken]
    core_problem = group_problem(CORE)
    if core_problem is not None:
        problems = [f"ViSpec is disabled here. {core_problem}"]
    return ["", *problems, *lines], core_problem is None and any(chains_ok)


def _state_line(state: PatchPointState) -> str:
    mark, text = ("ok", state.point.reason) if state.problem is None else ("FAIL", state.problem)
    return f"       {mark:4} {state.symbol}: {text}"


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
