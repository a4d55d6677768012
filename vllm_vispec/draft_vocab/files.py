"""Lists of the target tokens a draft may propose: the setting that names one, and the files.

A list is one integer tensor in a safetensors file, or JSON. A head's folder may ship one, named
draft_vocab.safetensors. The setting is checked when the engine is configured; workers read the list
again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vllm_vispec.config import ViSpecConfig
from vllm_vispec.heads.folder import DRAFT_VOCAB
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import writing

TENSOR = "token_ids"
ORDER, BY_FREQUENCY = "order", "frequency"
MIN_TOKENS = 2

_KEY = "speculative config: draft_vocab"
_MAKE = (
    "make one with `vispec vocab --head HEAD --target TARGET --data ANSWERS`, or leave draft_vocab "
    "out"
)


@dataclass(frozen=True)
class DraftVocab:
    """Target tokens a draft may propose.

    Attributes:
        token_ids: distinct ids of the target.
        by_frequency: the most frequent come first, so the first N are the best N.
    """

    token_ids: tuple[int, ...]
    by_frequency: bool = False

    def first(self, count: int) -> DraftVocab:
        """Return the `count` most frequent tokens.

        Raises:
            ViSpecError: the list is not ordered by frequency, or shorter.
        """
        if not self.by_frequency:
            raise ViSpecError(
                f"{_KEY}={count} takes the most frequent tokens of a list, but this list is not "
                f"ordered by frequency: make one with `vispec vocab`, or give its path to use all"
            )
        if not MIN_TOKENS <= count <= len(self.token_ids):
            raise ViSpecError(
                f"{_KEY}={count} is outside {MIN_TOKENS} to {len(self.token_ids)}, the tokens of "
                "the head's list: choose fewer, or make a longer list with `vispec vocab --size`"
            )
        return DraftVocab(self.token_ids[:count], by_frequency=True)


def resolve_draft_vocab(
    config: ViSpecConfig, settings: dict[str, Any], folder: Path, vocab_size: int
) -> ViSpecConfig:
    """Find and check the list, and let vLLM ask the draft for tokens rather than logits.

    Args:
        settings: the rest of the speculative config; ``use_local_argmax_reduction`` is switched on
            in it unless it is given or something needs all logits.
        folder: the head's.
        vocab_size: tokens of the target.

    Returns:
        The settings, with an absolute path; "auto" if it is that of the head's own list, which
        workers find in a folder of their own.

    Raises:
        ViSpecError: the list cannot be used, or not with the other settings.
    """
    setting = config.draft_vocab
    if find_vocab(setting, folder, vocab_size) is None:
        return config
    if settings.get("draft_lm_head_quantization"):
        raise ViSpecError(
            "speculative config: draft_vocab and draft_lm_head_quantization both replace the "
            "draft's lm_head: leave one of them out"
        )
    is_greedy = settings.get("draft_sample_method", "greedy") == "greedy"
    if is_greedy and not settings.get("enable_adaptive_verification"):
        settings.setdefault("use_local_argmax_reduction", True)
    if not isinstance(setting, str) or setting == "auto":
        return config
    path = _locate(setting, folder)
    is_heads = path == folder.absolute() / DRAFT_VOCAB
    return config.replace(draft_vocab="auto" if is_heads else str(path))


def find_vocab(
    setting: bool | str | int | None, folder: Path, vocab_size: int
) -> DraftVocab | None:
    """Return the tokens that a `draft_vocab` setting means; None: all.

    Args:
        setting: a file, "auto" or True for the head's list, an integer for its N most frequent.
        folder: the head's, on this machine.
        vocab_size: tokens of the target.

    Raises:
        ViSpecError: there is no such list, or it cannot be used.
    """
    if setting is None:
        return None
    vocab = read_vocab(_locate(setting, folder), vocab_size)
    is_count = isinstance(setting, int) and not isinstance(setting, bool)
    return vocab.first(int(setting)) if is_count else vocab


def _locate(setting: bool | str | int | None, folder: Path) -> Path:
    """Return the file that a `draft_vocab` setting means: a path, else the head's own list."""
    if isinstance(setting, str) and setting != "auto":
        path = Path(setting).expanduser().absolute()
        if not path.is_file():
            raise ViSpecError(
                f'{_KEY}={setting!r} is no file: give a list of token ids, "auto" for the one in '
                "the head's folder, or leave it out"
            )
        return path
    path = folder.absolute() / DRAFT_VOCAB
    if not path.is_file():
        raise ViSpecError(
            f"{_KEY}={setting!r}, but the head {folder} has no {DRAFT_VOCAB}: {_MAKE}"
        )
    return path


def read_vocab(path: Path, vocab_size: int) -> DraftVocab:
    """Read and check a list.

    Args:
        vocab_size: tokens of the target.

    Raises:
        ViSpecError: the file is unreadable or no list of ids, has fewer than two, an id twice, or
            one that the target does not have.
    """
    content = _read_json(path) if path.suffix == ".json" else _read_safetensors(path)
    ids = content.token_ids
    if len(ids) < MIN_TOKENS:
        raise ViSpecError(
            f"draft vocabulary {path} has {len(ids)} token ids, at least {MIN_TOKENS} are needed: "
            f"{_MAKE}"
        )
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ViSpecError(
            f"draft vocabulary {path} has token id {wrong}, the target has 0 to {vocab_size - 1}: "
            f"it belongs to another target, {_MAKE}"
        )
    if len(set(ids)) < len(ids):
        raise ViSpecError(f"draft vocabulary {path} has a token id twice: remove one, or {_MAKE}")
    return content


def write_vocab(path: Path, token_ids: Sequence[int]) -> None:
    """Write ids, the most frequent first, as safetensors (int32 [N]).

    Raises:
        ViSpecError: the file cannot be written.
    """
    import numpy as np
    from safetensors.numpy import save_file

    content = {TENSOR: np.asarray(token_ids, dtype=np.int32)}
    with writing(path) as aside:
        save_file(content, aside, metadata={ORDER: BY_FREQUENCY})
        aside.chmod(0o644)


def check_lm_head(config: ViSpecConfig, target: Any) -> None:
    """Refuse a list of tokens for a target whose configuration says that its lm_head is quantized.

    Not all say so; workers look at the weights themselves.

    Args:
        target: vLLM's ``ModelConfig``.

    Raises:
        ViSpecError: names the setting and the remedy.
    """
    if config.draft_vocab is None:
        return
    for hf_config in (target.hf_config, target.hf_text_config):
        stated = getattr(hf_config, "quantization_config", None)
        if isinstance(stated, Mapping) and _quantizes_lm_head(stated):
            raise quantized_lm_head(stated.get("quant_method"))


def quantized_lm_head(method: Any) -> ViSpecError:
    """Return the error about a target whose lm_head has no rows to take."""
    return ViSpecError(
        f"{_KEY} needs an lm_head in float32, bfloat16 or float16, the target's is quantized "
        f"({method}): leave draft_vocab out"
    )


def _quantizes_lm_head(stated: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's ``quantization_config`` names lm_head among what is quantized."""
    if stated.get("lm_head"):  # GPTQ and AWQ
        return True
    layer = (stated.get("extra_config") or {}).get("lm_head") or {}  # AutoRound
    if layer.get("bits", 16) < 16:
        return True
    groups = (stated.get("config_groups") or {}).values()  # compressed-tensors
    targets = [name for group in groups for name in group.get("targets") or ()]
    return any(name.endswith("lm_head") for name in targets)


def _read_safetensors(path: Path) -> DraftVocab:
    try:
        with safe_open(str(path), framework="numpy") as file:
            names = list(file.keys())
            values = file.get_tensor(names[0]) if len(names) == 1 else None
            order = (file.metadata() or {}).get(ORDER)
    except (SafetensorError, OSError) as error:
        raise ViSpecError(
            f"draft vocabulary {path} cannot be read as safetensors ({error}): {_MAKE}"
        ) from error
    if values is None or values.ndim != 1 or values.dtype.kind not in "iu":
        raise ViSpecError(
            f"draft vocabulary {path} must hold one tensor, a list of integers: {_MAKE}"
        )
    return DraftVocab(tuple(values.tolist()), order == BY_FREQUENCY)


def _read_json(path: Path) -> DraftVocab:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ViSpecError(
            f"draft vocabulary {path} cannot be read as JSON ({error}): {_MAKE}"
        ) from error
    section = content if isinstance(content, dict) else {TENSOR: content}
    ids = section.get(TENSOR)
    if not isinstance(ids, list) or any(type(token) is not int for token in ids):
        raise ViSpecError(
            f"draft vocabulary {path} holds no list of integers, neither as such nor under "
            f'"{TENSOR}": give the {DRAFT_VOCAB} beside it, or {_MAKE}'
        )
    return DraftVocab(tuple(ids), section.get(ORDER) == BY_FREQUENCY)
