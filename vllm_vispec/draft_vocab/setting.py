"""The setting ``draft_vocab``: resolved and checked at configuration time, read in the workers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_vispec.config import ViSpecConfig
from vllm_vispec.draft_vocab.files import DraftVocab, choose_tokens, locate_vocab, read_vocab
from vllm_vispec.utils.errors import ViSpecError


def read_setting(config: ViSpecConfig, folder: Path, vocab_size: int) -> DraftVocab | None:
    """Return the tokens that the settings ask for, None if they ask for all.

    Args:
        folder: the head's, on this machine.
        vocab_size: tokens of the target.

    Raises:
        ViSpecError: the list cannot be used.
    """
    if config.draft_vocab_file is None:
        return None
    vocab = read_vocab(folder / config.draft_vocab_file, vocab_size)
    return choose_tokens(config.draft_vocab, vocab)


def resolve_draft_vocab(
    config: ViSpecConfig, settings: dict[str, Any], folder: Path, vocab_size: int
) -> ViSpecConfig:
    """Find and check the list, and let vLLM ask the draft for tokens rather than logits.

    Args:
        settings: the rest of the speculative config; ``use_local_argmax_reduction`` is switched on
            in it unless it is given or something needs all logits.
        folder: the head's.
        vocab_size: tokens of the target.

    Raises:
        ViSpecError: the list cannot be used, or not with the other settings.
    """
    if config.draft_vocab is None or config.draft_vocab is False:
        return config
    if settings.get("draft_lm_head_quantization"):
        raise ViSpecError(
            "speculative config: draft_vocab and draft_lm_head_quantization both replace the "
            "draft's lm_head: leave one of them out"
        )
    path, folder = locate_vocab(config.draft_vocab, folder), folder.absolute()
    is_in_head = path.is_relative_to(folder)
    found = config.replace(draft_vocab_file=str(path.relative_to(folder) if is_in_head else path))
    read_setting(found, folder, vocab_size)
    is_greedy = settings.get("draft_sample_method", "greedy") == "greedy"
    if is_greedy and not settings.get("enable_adaptive_verification"):
        settings.setdefault("use_local_argmax_reduction", True)
    return found


def check_lm_head(config: ViSpecConfig, target: Any) -> None:
    """Refuse a list of tokens for a target whose configuration says that its lm_head is quantized.

    Not all say so; workers look at the weights themselves.

    Args:
        target: vLLM's ``ModelConfig``.

    Raises:
        ViSpecError: Names the setting and the remedy.
    """
    if config.draft_vocab_file is None:
        return
    for hf_config in (target.hf_config, target.hf_text_config):
        stated = getattr(hf_config, "quantization_config", None)
        if isinstance(stated, Mapping) and _quantizes_lm_head(stated):
            raise ViSpecError(
                "speculative config: draft_vocab needs an lm_head in float32, bfloat16 or float16, "
                f"the target's is quantized ({stated.get('quant_method')}): leave draft_vocab out"
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
