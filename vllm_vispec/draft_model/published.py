"""Which folders are published models, and their configuration as vLLM reads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from vllm.config import LoadConfig, ModelConfig, SpeculativeConfig, VllmConfig
from vllm.model_executor.models import ModelRegistry

from vllm_vispec.config import ViSpecConfig
from vllm_vispec.draft_model.fit import check_fit, size_warning
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.folder import (
    CONFIG,
    HeadInfo,
    is_vispec_head,
    read_json,
    tensor_names,
    weight_files,
)
from vllm_vispec.heads.formats import describe_other_draft
from vllm_vispec.heads.location import head_folder, resolve_head
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

VLM, TEXT_MODEL = "published model", "published text model"
"""What stands for a checkpoint format."""
_REFUSED = "disable_padded_drafter_batch enable_adaptive_verification use_local_argmax_reduction"


def find(model: str, settings: Mapping[str, Any], target: ModelConfig) -> HeadInfo | None:
    """Return the published model that the settings name, None if they name a head.

    Raises:
        ViSpecError: It does not fit the target, or cannot be served.
    """
    folder = resolve_head(model, settings.get("revision"))
    if not _is_whole_model(folder):
        return None
    own = read_published(folder, settings.get("revision"), settings.get("quantization"), target)
    check_fit(model, own, target)
    info = _describe(folder, own, target.get_vocab_size())
    logger.info("ViSpec: draft %s adds %s", model, added_memory(info, target))
    if (warning := size_warning(info.config, target)) is not None:
        logger.warning("ViSpec: %s", warning)
    return info


def _is_whole_model(folder: Path) -> bool:
    """Whether a folder holds a model of vLLM's; heads, too, may name their target's class."""
    config = read_json(folder / CONFIG)
    names = config.get("architectures") or ()
    if set(names).isdisjoint(ModelRegistry.get_supported_archs()) or is_vispec_head(folder):
        return False
    return describe_other_draft(config, tensor_names(folder)) is None


def describes(info: HeadInfo) -> bool:
    """Whether a description is that of a published model."""
    return info.checkpoint_format in (VLM, TEXT_MODEL)


def check_settings(
    info: HeadInfo, config: ViSpecConfig, settings: Mapping[str, Any]
) -> ViSpecConfig:
    """Refuse settings that do not go with a published model; say what it sees of images.

    Raises:
        ViSpecError: Names the setting and the remedy.
    """
    given = {**settings, "draft_vocab": config.draft_vocab}
    for name in ("draft_vocab", *_REFUSED.split()):
        if given.get(name):
            raise ViSpecError(
                f"speculative config: {name} does not go with a published model as the draft; "
                "leave it out"
            )
    if info.checkpoint_format == TEXT_MODEL:
        if config.images not in (None, "none"):
            raise ViSpecError(
                f'speculative config: images="{config.images}" does not go with a text model; '
                "leave it out"
            )
        logger.info("ViSpec: the draft is a text model and sees no images")
        return config.replace(images="none")
    share = config.image_share
    seen, is_mean = "all image rows", ""
    if share is not None:
        seen = f"1 of {share.amount} image rows" if share.amount else "no images"
        is_mean = ", their mean" if share.name == "pool" else ""
    logger.info("ViSpec: the draft sees %s%s", seen, is_mean)
    return config


def refuse_images(config: ViSpecConfig) -> None:
    """Refuse the setting that only published models have.

    Raises:
        ViSpecError: It is set.
    """
    if config.images is not None:
        raise ViSpecError(
            "speculative config: images goes with a published model as the draft; leave it out"
        )


def check_engine(vllm_config: Any) -> None:
    """Refuse engines in which the draft would not see what the target sees.

    Raises:
        ViSpecError: Names the setting and the remedy.
    """
    settings = {
        "kv_transfer_config": vllm_config.kv_transfer_config,
        "ec_transfer_config": vllm_config.ec_transfer_config,
        "cudagraph_mm_encoder": vllm_config.compilation_config.cudagraph_mm_encoder,
        "mm_encoder_only": vllm_config.is_mm_encoder_only,
    }
    for name, value in settings.items():
        if value:
            raise ViSpecError(
                f"{name} does not go with a published model as the draft, whose vision tower runs "
                "with the target's; leave it out"
            )
    draft = vllm_config.speculative_config.draft_model_config
    ranks = vllm_config.parallel_config.tensor_parallel_size
    towers = getattr(vllm_config.model_config.multimodal_config, "mm_encoder_tp_mode", "data")
    heads = tower_heads(head_folder(draft))
    if towers == "weights" and heads % ranks:
        raise ViSpecError(
            f"tensor_parallel_size={ranks} does not fit the {heads} attention heads of the "
            "draft's vision tower: set --mm-encoder-tp-mode data"
        )


def tower_heads(folder: Path) -> int:
    """Return the number of attention heads of a published model's vision tower; 0: it has none."""
    vision = read_json(folder / CONFIG).get("vision_config") or {}
    return int(vision.get("num_attention_heads") or vision.get("num_heads") or 0)


def _describe(folder: Path, own: ModelConfig, vocab_size: int) -> HeadInfo:
    """Describe a published model as vLLM's EAGLE route needs to know it."""
    text = own.hf_text_config
    head = HeadConfig(
        target_model_type="",
        hidden_size=own.get_hidden_size(),
        intermediate_size=getattr(text, "intermediate_size", None) or 1,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=own.get_total_num_kv_heads(),
        head_dim=own.get_head_size(),
        vocab_size=vocab_size,
        max_position_embeddings=own.max_model_len,
        rope_theta=1.0,
        rms_norm_eps=1e-6,
        num_query_tokens=1,
        qkv_bias=False,
        fc_bias=False,
        layer0_input_norm=True,
        final_norm=True,
        global_feature=False,
        compress=False,
        num_hidden_layers=text.num_hidden_layers,
        # Like a draft VLM of ours it reads image features, and no states of the target's.
        vision_size=own.get_inputs_embeds_size() * _num_levels(own),
    )
    kind = VLM if own.is_multimodal_model else TEXT_MODEL
    return HeadInfo(kind, head, folder, tuple(weight_files(folder)), {})


def _num_levels(own: ModelConfig) -> int:
    """Return how many features a tower makes of a token; DeepStack keeps some of its layers'."""
    vision = getattr(own.hf_config, "vision_config", None)
    return 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())


def added_memory(info: HeadInfo, target: ModelConfig) -> str:
    """Say what a draft adds to memory, in all ranks together."""
    head, size = info.config, target.dtype.itemsize
    stored = sum(file.stat().st_size for file in info.files)
    weights = f"{stored / 2**30:.2f} GiB" if stored >= 2**30 else f"{stored / 2**20:.1f} MiB"
    values = 2 * head.num_hidden_layers * head.num_key_value_heads * head.head_dim
    found = f"{weights} of weights, {values * size} bytes of KV cache for a token"
    if info.checkpoint_format == TEXT_MODEL:
        return f"{found}, and sees no images"
    features = head.vision_size * size
    return (
        f"{found}, and {features} bytes for a token of a cached image ({features / 1024:.1f} MiB "
        "for 1,024)"
    )


def read_published(
    model: str | Path, revision: str | None, quantization: str | None, target: ModelConfig
) -> ModelConfig:
    """Read a published model's configuration as it is served beside a target.

    Raises:
        ViSpecError: vLLM cannot read or serve it.
    """
    try:
        own = ModelConfig(
            model=str(model),
            runner="draft",
            tokenizer=target.tokenizer,
            tokenizer_mode=target.tokenizer_mode,
            dtype=target.dtype,
            seed=target.seed,
            revision=revision,
            quantization=quantization,
            enforce_eager=target.enforce_eager,
        )
        # Asked here so that a method which this machine lacks is refused before a worker starts.
        VllmConfig.get_quantization_config(own, LoadConfig())
    except (ValueError, OSError, ImportError) as error:
        raise _unusable(f"draft {model}", error) from error
    if own.multimodal_config is not None:
        # One engine: towers are split and limited alike.
        own.multimodal_config = target.multimodal_config
    return own


def read_target(target: str, **settings: Any) -> ModelConfig:
    """Read a target's configuration where no engine has done so.

    Raises:
        ViSpecError: vLLM cannot read it.
    """
    try:
        return ModelConfig(model=target, **settings)
    except (ValueError, OSError, ImportError) as error:
        raise _unusable(f"target {target}", error) from error


def _unusable(what: str, error: Exception) -> ViSpecError:
    # pydantic puts lines of its own around what vLLM says.
    text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    reason = " ".join(text.removeprefix("Value error, ").split())
    return ViSpecError(
        f"{what} cannot be used by this vLLM ({reason}): give a model that it serves on this "
        "machine without remote code"
    )


def published_model_config(vllm_config: VllmConfig) -> ModelConfig:
    """Read the configuration of an engine's draft, in a worker."""
    speculative = vllm_config.speculative_config
    assert isinstance(speculative, SpeculativeConfig)
    draft, target = speculative.draft_model_config, speculative.target_model_config
    return read_published(draft.model, draft.revision, speculative.quantization, target)
