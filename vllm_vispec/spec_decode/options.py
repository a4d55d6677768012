"""Settings of the plugin itself, given next to vLLM's in ``--speculative-config``.

They travel to the workers inside the draft's configuration, because vLLM's own speculative
configuration admits no unknown keys.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from vllm_vispec.utils.errors import ViSpecError

METHOD = "vispec"
SECTION = "vispec_engine"
SETTING_FLAGS = {
    "spec_method": "method",
    "spec_model": "model",
    "spec_tokens": "num_speculative_tokens",
}
"""vLLM's flags for single keys of the speculative config."""
_FOUND = {"checkpoint_format", "draft_vocab_file"}


@dataclass(frozen=True)
class EngineOptions:
    """Plugin settings.

    Attributes:
        image_table_size: Images whose adaptor output is kept on the device, least recently used
            first out.  One image takes ``num_query_tokens * hidden_size`` elements.  None: 1024,
            or as many as fit into 384 MiB, see `model.make_rows`.
        checkpoint_format: Whose tensor names the head's files use; found by inspection, not set by
            users.
        draft_vocab: Tokens the draft may propose: a file with a list of them, True or "auto" for
            the list in the head's folder, or an integer for its N most frequent; None: all.
        draft_vocab_file: Where that list lies, relative to the head's folder if it lies in there;
            found, not set by users.
        tree: How draft trees are grown, see `tree.settings.TreeSettings`; None: chains.

    Raises:
        ViSpecError: If a value is out of range.
    """

    image_table_size: int | None = None
    checkpoint_format: str = "canonical"
    draft_vocab: str | int | None = None
    draft_vocab_file: str | None = None
    tree: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        size = self.image_table_size
        is_count = isinstance(size, int) and not isinstance(size, bool)
        if size is not None and not (is_count and 1 <= size <= 1_000_000):
            raise ViSpecError(
                f"speculative config: image_table_size={size!r} must be an integer between 1 and "
                "1000000; leave it out for the default of 1024"
            )
        if not isinstance(self.draft_vocab, str | int | None) or self.draft_vocab == "":
            raise ViSpecError(
                f'speculative config: draft_vocab={self.draft_vocab!r} must be a file, "auto", or '
                "a number of tokens; leave it out to draft from the whole vocabulary"
            )

    @classmethod
    def keys(cls) -> frozenset[str]:
        """Return the plugin's keys of the speculative config."""
        return frozenset(option.name for option in fields(cls)) - _FOUND

    @classmethod
    def pop_from(cls, speculative: dict[str, Any]) -> "EngineOptions":
        """Take the plugin's keys out of a speculative config."""
        return cls(**{name: speculative.pop(name) for name in cls.keys() & speculative.keys()})

    def with_checkpoint_format(self, name: str) -> "EngineOptions":
        """Return a copy that names the head's checkpoint format."""
        return replace(self, checkpoint_format=name)

    def with_draft_vocab_file(self, path: str) -> "EngineOptions":
        """Return a copy that names the file of the draft's vocabulary."""
        return replace(self, draft_vocab_file=path)

    def to_section(self) -> dict[str, Any]:
        """Return the entry to put into the draft's configuration."""
        return {SECTION: asdict(self)}

    @classmethod
    def from_hf_config(cls, hf_config: Any) -> "EngineOptions":
        """Read the settings back in a worker; defaults where the head came without any."""
        section: Mapping[str, Any] = getattr(hf_config, SECTION, None) or {}
        return cls(**section)


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
