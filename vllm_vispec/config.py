"""The settings of ViSpec: parsed and checked once, then carried to every process as they are.

Users give them beside vLLM's keys in ``--speculative-config``.  Workers find them in
``VllmConfig.additional_config["vispec"]``.  Imports nothing of vLLM's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from vllm_vispec.compressors.spec import MAX_AMOUNT, CompressorSpec, parse_compressor
from vllm_vispec.heads.config import (
    ARCHITECTURES,
    DRAFT_MODEL_ARCHITECTURE,
    DRAFT_VLM_ARCHITECTURE,
    EMBEDS_ARCHITECTURE,
    HeadConfig,
)
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import Settings, parse

METHOD = "vispec"
SECTION = "vispec"
"""Key of ``VllmConfig.additional_config``."""
SETTING_FLAGS = {
    "spec_method": "method",
    "spec_model": "model",
    "spec_tokens": "num_speculative_tokens",
}
"""vLLM's flags for single keys of the speculative config."""
SETTING_KEYS = frozenset(
    {"adaptive", "image_table_size", "draft_vocab", "tree", "images", "checkpoint_format"}
)
"""Our keys of the speculative config."""
_MAX_IMAGES = 1_000_000


class ViSpecConfig(Settings):
    """What ViSpec is told, and what it found out about the head when the engine was configured."""

    adaptive: bool | None = Field(
        default=None,
        description="Whether the number of draft tokens follows load and acceptance, down to none. "
        "Default: yes for chains, where nothing else decides it.",
    )
    image_table_size: int | None = Field(
        default=None,
        description="Images whose adaptor output is kept on the device, least recently used first "
        "out. One image takes num_query_tokens * hidden_size elements. Default: 1024, or as many "
        "as fit into 384 MiB.",
    )
    draft_vocab: bool | int | str | None = Field(
        default=None,
        description='Tokens the draft may propose: a file with a list of them, true or "auto" for '
        "the list in the head's folder, or an integer for its N most frequent. Default: all.",
    )
    tree: TreeSettings | None = Field(
        default=None, description="How draft trees are grown. Default: chains are drafted."
    )
    images: str | None = Field(
        default=None,
        description='What a published model as the draft sees of images: "all", "none", or of N '
        'rows one that stays ("prune:N") or their mean ("pool:N"). Default: all, of text models '
        "none.",
    )
    checkpoint_format: str = Field(
        default="canonical",
        description="Whose tensor names the head's files use. Found by inspection; to be given for "
        'heads in the layout of EAGLE-1: "msd", or "eagle" for one that sees images.',
    )

    @field_validator("image_table_size", mode="before")
    @classmethod
    def _check_image_table_size(cls, size: Any) -> Any:
        is_count = isinstance(size, int) and not isinstance(size, bool)
        if size is not None and not (is_count and 1 <= size <= _MAX_IMAGES):
            raise ViSpecError(
                f"speculative config: image_table_size={size!r} must be an integer between 1 and "
                f"{_MAX_IMAGES}; leave it out for the default of 1024"
            )
        return size

    @field_validator("images", mode="before")
    @classmethod
    def _check_images(cls, given: Any) -> Any:
        read_images(given, "speculative config: images=")
        return given

    @property
    def image_share(self) -> CompressorSpec | None:
        """Which rows of an image a published model sees; None: all of them."""
        return read_images(self.images)

    @field_validator("draft_vocab", mode="before")
    @classmethod
    def _check_draft_vocab(cls, given: Any) -> Any:
        if not isinstance(given, str | int | None) or given == "":
            raise ViSpecError(
                f'speculative config: draft_vocab={given!r} must be a file, "auto", or '
                "a number of tokens; leave it out to draft from the whole vocabulary"
            )
        return None if given is False else given

    @classmethod
    def pop_from(cls, speculative: dict[str, Any]) -> ViSpecConfig:
        """Take our keys out of a speculative config.

        Raises:
            ViSpecError: names the key and the remedy.
        """
        given = {name: speculative.pop(name) for name in SETTING_KEYS & speculative.keys()}
        return parse(cls, given, lambda name: f"speculative config: {name}", "docs/trees.md")

    @classmethod
    def from_vllm(cls, vllm_config: Any) -> ViSpecConfig:
        """Return an engine's settings; the defaults where it was given none."""
        sections = getattr(vllm_config, "additional_config", None)
        return cls(**sections.get(SECTION, {})) if isinstance(sections, Mapping) else cls()

    def to_section(self) -> dict[str, Any]:
        """Return the entry for ``VllmConfig.additional_config``, plain data."""
        return {SECTION: self.model_dump(mode="json")}

    def replace(self, **changes: Any) -> ViSpecConfig:
        """Return a copy with other values."""
        return self.model_copy(update=changes)


def settings_of(args: Any) -> dict[str, Any]:
    """Return the speculative config in vLLM's `EngineArgs`, with its flags for single keys in it.

    Raises:
        ViSpecError: A key is given both ways.
    """
    given = args.speculative_config or {}
    settings = {str(key).replace("-", "_"): value for key, value in given.items()}
    for flag, key in SETTING_FLAGS.items():
        value = getattr(args, flag, None)
        if value is None:
            continue
        if key in settings:
            raise ViSpecError(
                f"speculative config: {key} is given twice, here and as "
                f"--{flag.replace('_', '-')}; leave one of them out"
            )
        settings[key] = value
    return settings


def uses_vispec(vllm_config: Any) -> bool:
    """Whether the engine's draft is a ViSpec head."""
    return not _draft_architectures(vllm_config).isdisjoint(ARCHITECTURES)


def reads_embeddings(vllm_config: Any) -> bool:
    """Whether the draft takes the image tokens' embeddings as its input."""
    reading = {EMBEDS_ARCHITECTURE, DRAFT_VLM_ARCHITECTURE, DRAFT_MODEL_ARCHITECTURE}
    return not _draft_architectures(vllm_config).isdisjoint(reading)


def reads_target_states(vllm_config: Any) -> bool:
    """Whether the draft takes the target's hidden states in; a model of its own does not."""
    own = {DRAFT_VLM_ARCHITECTURE, DRAFT_MODEL_ARCHITECTURE}
    return _draft_architectures(vllm_config).isdisjoint(own)


def drafts_with_published(vllm_config: Any) -> bool:
    """Whether the draft is a published model, as it is."""
    return DRAFT_MODEL_ARCHITECTURE in _draft_architectures(vllm_config)


def read_images(images: Any, setting: str = "images=") -> CompressorSpec | None:
    """Return which rows of an image the setting of this name means; None: all of them.

    Args:
        setting: how the user writes it, for messages.

    Raises:
        ViSpecError: it means nothing.
    """
    if images in (None, "all"):
        return None
    if images == "none":
        return parse_compressor("text_only")
    amount = re.fullmatch(r"(?:prune|pool):(\d{1,4})", str(images))
    if amount is None or not 1 <= int(amount[1]) <= MAX_AMOUNT:
        raise ViSpecError(
            f'{setting}{images!r} must be "all", "none", "prune:N" or "pool:N" with N from 1 to '
            f"{MAX_AMOUNT}; leave it out for all that the draft can see"
        )
    return parse_compressor(images)


def hides_images(vllm_config: Any) -> bool:
    """Whether the draft is a published model that sees no images, or a share of their rows."""
    return ViSpecConfig.from_vllm(vllm_config).image_share is not None


def trims_drafts(vllm_config: Any) -> bool:
    """Whether vLLM verifies fewer draft tokens than there are, by what it expects of them."""
    return bool(getattr(vllm_config.speculative_config, "enable_adaptive_verification", False))


def head_of(vllm_config: Any) -> HeadConfig:
    """Return the head that the engine drafts with."""
    draft = vllm_config.speculative_config.draft_model_config
    return HeadConfig.from_config_json(draft.hf_config.to_dict())


def _draft_architectures(vllm_config: Any) -> set[str]:
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    return set(draft.hf_config.architectures or ()) if draft is not None else set()
