"""Refusals at start: everything that could not work, said in one line with the remedy."""

from dataclasses import fields
from typing import Any, get_args

from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, speculative

from vllm_vispec.config import METHOD, SETTING_KEYS
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.families import was_tested
from vllm_vispec.heads.target import check_against_target, tensor_parallel_sizes
from vllm_vispec.utils.errors import ViSpecError, did_you_mean
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

MAX_DRAFT_TOKENS = 32

_UNSUPPORTED_SETTINGS = {
    "parallel_drafting": "every draft is made one token at a time; leave it out",
    "use_heterogeneous_vocab": "drafts have the target's vocabulary; leave it out",
}


# Fields of vLLM's `SpeculativeConfig` that vLLM fills itself.
_FILLED_BY_VLLM = frozenset(
    f"{model}_{kind}_config" for model in ("target", "draft") for kind in ("model", "parallel")
)


def check_keys(settings: dict[str, Any]) -> None:
    """Refuse keys of the speculative config that neither vLLM nor ViSpec knows.

    Raises:
        ViSpecError: Names the key, and the known one nearest to it.
    """
    known = {field.name for field in fields(SpeculativeConfig)} - _FILLED_BY_VLLM | SETTING_KEYS
    for name in settings:
        if name not in known:
            hint = did_you_mean(name, known) or (
                f"; leave it out (ViSpec's keys are {', '.join(sorted(SETTING_KEYS))}, the others "
                "vLLM's)"
            )
            raise ViSpecError(f'speculative config: key "{name}" is unknown{hint}')


def refuse_method(method: Any, error: Exception) -> None:
    """Raise in vLLM's place if the method is what it refused; vLLM's list has no ``vispec``.

    Raises:
        ViSpecError: Names the methods, and the one nearest to what was given.
    """
    known = _methods()
    if method is None or method in known:
        return
    # Methods of single models ("deepseek_mtp") are deprecated names of "mtp".
    methods = [METHOD, *(name for name in known if not name.endswith("_mtp"))]
    raise ViSpecError(
        f"speculative config: method={method!r} is unknown"
        f"{did_you_mean(method, methods) or ';'} choose one of {', '.join(methods)}"
    ) from error


def refuse_other_method(method: Any, model: str) -> None:
    """Refuse one of vLLM's methods for a ViSpec head.

    Raises:
        ViSpecError: Names the method to use.
    """
    if method in _methods():
        raise ViSpecError(
            f"speculative config: method={method!r} does not fit, {model} is a ViSpec head; use "
            f'"method": "{METHOD}"'
        )


def _methods() -> tuple[str, ...]:
    """Return the names of vLLM's methods; they only make messages better, so they may be gone."""
    literal = getattr(speculative, "SpeculativeMethod", None)
    return tuple(str(name) for name in get_args(literal))


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
    if target.is_mm_prefix_lm:
        raise ViSpecError(
            f"target {target.model} attends over images in both directions (prefix-LM), which a "
            "draft's causal layer does not; serve it without the head, or for text only "
            "(--language-model-only)"
        )
    text_config = target.hf_text_config
    warning = check_against_target(
        head, text_config.hidden_size, text_config.vocab_size, target.hf_config.model_type
    )
    if warning:
        logger.warning("ViSpec: %s", warning)
    if not was_tested(target.hf_config.model_type):
        logger.warning(
            "ViSpec: %s is no family that was tested (docs/targets.md); sizes fit, and what is "
            "accepted of the first draft tokens will be judged",
            target.hf_config.model_type,
        )
    pruning = getattr(target.multimodal_config, "video_pruning_rate", None)
    if pruning:
        raise ViSpecError(
            f"video_pruning_rate={pruning} drops video tokens the head expects; set it to 0"
        )
    check_parallel(head, parallel)


def check_parallel(head: HeadConfig, parallel: ParallelConfig) -> None:
    """Check that a draft can be spread as the target is.

    Raises:
        ViSpecError: Names the setting and the remedy.
    """
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
    if tp_size not in tensor_parallel_sizes(head):
        sizes_that_fit = ", ".join(map(str, tensor_parallel_sizes(head)))
        raise ViSpecError(
            f"tensor_parallel_size={tp_size} does not fit the draft's {head.num_attention_heads} "
            f"attention heads and {head.num_key_value_heads} key/value heads; choose one of "
            f"{sizes_that_fit}"
        )
