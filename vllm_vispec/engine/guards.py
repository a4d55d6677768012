"""Refusals at start: everything that could not work, said in one line with the remedy."""

from typing import Any

from vllm.config import ModelConfig, ParallelConfig

from vllm_vispec.dialects import check_against_target
from vllm_vispec.errors import ViSpecError
from vllm_vispec.head_config import HeadConfig
from vllm_vispec.logs import get_logger

logger = get_logger(__name__)

MAX_DRAFT_TOKENS = 32

_UNSUPPORTED_SETTINGS = {
    "parallel_drafting": "a ViSpec head drafts one token at a time; leave it out",
    "use_heterogeneous_vocab": "a ViSpec head shares the target's vocabulary; leave it out",
}


def check_settings(
    settings: dict[str, Any], parallel: ParallelConfig, *, has_tree: bool = False
) -> None:
    """Check the speculative config itself; with a tree, the number of drafts is checked there.

    Raises:
        ViSpecError: Names the setting and the remedy.
    """
    if not has_tree:
        _check_chain_length(settings.get("num_speculative_tokens"))
    for name, remedy in _UNSUPPORTED_SETTINGS.items():
        if settings.get(name):
            raise ViSpecError(f"speculative config: {name} does not work with ViSpec: {remedy}")
    draft_tp = settings.get("draft_tensor_parallel_size")
    if draft_tp not in (None, parallel.tensor_parallel_size):
        raise ViSpecError(
            f"speculative config: draft_tensor_parallel_size={draft_tp} must equal the target's "
            f"{parallel.tensor_parallel_size}; leave it out"
        )


def _check_chain_length(count: Any) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_DRAFT_TOKENS:
        raise ViSpecError(
            f"speculative config: num_speculative_tokens={count!r} must be an integer between 1 "
            f"and {MAX_DRAFT_TOKENS}; 3 to 6 suits most heads"
        )


def check_target(head: HeadConfig, target: ModelConfig, parallel: ParallelConfig) -> None:
    """Check that head, target and parallel layout fit together.

    Raises:
        ViSpecError: Names what does not fit and the remedy.
    """
    if not target.is_multimodal_model:
        raise ViSpecError(
            f"target {target.model} takes no images; ViSpec needs a vision-language target, use a "
            "plain EAGLE head for a text model"
        )
    text_config = target.hf_text_config
    warning = check_against_target(
        head, text_config.hidden_size, text_config.vocab_size, target.hf_config.model_type
    )
    if warning:
        logger.warning("ViSpec: %s", warning)
    pruning = getattr(target.multimodal_config, "video_pruning_rate", None)
    if pruning:
        raise ViSpecError(
            f"video_pruning_rate={pruning} drops video tokens the head expects; set it to 0"
        )
    _check_parallel(head, parallel)


def _check_parallel(head: HeadConfig, parallel: ParallelConfig) -> None:
    sizes = {
        "pipeline_parallel_size": "image features live on the first stage, the draft on the last",
        "prefill_context_parallel_size": "the draft needs a prompt's rows in one place",
        "decode_context_parallel_size": "untested with a padded draft head",
    }
    for name, reason in sizes.items():
        if getattr(parallel, name, 1) > 1:
            raise ViSpecError(
                f"{name}={getattr(parallel, name)} does not work with ViSpec "
                f"({reason}); set it to 1"
            )
    tp_size = parallel.tensor_parallel_size
    if head.num_attention_heads % tp_size or head.num_key_value_heads % tp_size:
        raise ViSpecError(
            f"tensor_parallel_size={tp_size} does not divide the head's {head.num_attention_heads} "
            f"attention and {head.num_key_value_heads} key/value heads; choose one that does"
        )
