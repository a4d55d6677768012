"""Head sizes that no attention backend serves are refused before a worker exists, if known."""

from copy import copy
from typing import Any

from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_vispec.config import head_of, hides_images
from vllm_vispec.heads.config import ARCHITECTURE, HeadConfig
from vllm_vispec.trees.limits import num_code_channels


def check_padded_heads(vllm_config: Any) -> None:
    """Check the heads that layers will have, the draft's and, with trees, the target's.

    vLLM's selector imports FlashInfer, which would initialise the device in this process, unless
    the platform has no such backend or the settings name another one.  Layers are checked again
    when they are built.

    Raises:
        ViSpecError: Names the setting and the remedy.
    """
    draft_config = _draft_config(vllm_config)
    head = head_of(vllm_config)
    is_masked = head.architecture == ARCHITECTURE or hides_images(vllm_config)
    if is_masked and _can_select_here(draft_config):
        _check_draft(draft_config, head)
    num_codes = num_code_channels(vllm_config)
    if num_codes and _can_select_here(vllm_config):
        _check_target(vllm_config, num_codes)


def _draft_config(vllm_config: Any) -> Any:
    """Return the configuration under which vLLM will build the draft."""
    speculative = vllm_config.speculative_config
    config = copy(vllm_config)
    config.attention_config = copy(config.attention_config)
    config.cache_config = copy(config.cache_config)
    if speculative.attention_backend is not None or not vllm_config.use_v2_model_runner:
        # On V1 drafts do not inherit the target's.
        config.attention_config.backend = speculative.attention_backend
    if speculative.kv_cache_dtype is not None:
        config.cache_config.cache_dtype = speculative.kv_cache_dtype
    return config


def _can_select_here(vllm_config: Any) -> bool:
    backend = vllm_config.attention_config.backend
    return current_platform.is_cpu() or (backend is not None and "FLASHINFER" not in backend.name)


def _check_draft(config: Any, head: HeadConfig) -> None:
    from vllm_vispec.models.padded_heads import BackendFinder, padded_draft_head

    spec = head.compressor_spec
    num_branches = len(spec.primitives) if head.has_compressor and spec.gated else 0
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        finder = BackendFinder.of_layer(1, head.head_dim, 1.0, cache_config=config.cache_config)
        padded_draft_head(finder, head.head_dim, num_branches)


def _check_target(config: Any, num_codes: int) -> None:
    from vllm_vispec.models.padded_heads import BackendFinder
    from vllm_vispec.trees.attention import padded_head

    head_size = config.model_config.get_head_size()
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        finder = BackendFinder.of_layer(1, head_size, 1.0, cache_config=config.cache_config)
        padded_head(finder, head_size, num_codes)
