"""Dialogues as chat messages, and as text and token ids by the chat template of a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_vispec.data.image_bounds import set_bounds
from vllm_vispec.data.images import data_url
from vllm_vispec.data.types import Turn, to_messages
from vllm_vispec.heads.location import is_hub_id
from vllm_vispec.utils.errors import ViSpecError, first_line


def load_processor(target: str | Path, bounds: Mapping[str, int] | None = None) -> Any:
    """Return the Hugging Face processor of a target (folder or hub id); runs no remote code.

    Args:
        bounds: of images, see `image_bounds.set_bounds`; None: the processor's own.

    Raises:
        ViSpecError: it has none, none that reads images, or no chat template.
    """
    from transformers import AutoProcessor

    if not Path(target).is_dir() and not is_hub_id(str(target)):
        raise ViSpecError(
            f"target {target} is neither a folder nor a hub id like 'org/name': give the folder or "
            "hub id of a vision-language model"
        )
    try:
        processor = AutoProcessor.from_pretrained(str(target), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ViSpecError(
            f"target {target}: no processor ({first_line(error)}); give the folder or hub id of a "
            "vision-language model"
        ) from error
    if getattr(processor, "image_processor", None) is None:
        raise ViSpecError(
            f"target {target} reads no images; give a vision-language model with an image processor"
        )
    if not getattr(processor, "chat_template", None):
        raise ViSpecError(
            f"target {target} has no chat template; add chat_template.jinja to its folder"
        )
    if bounds is not None:
        set_bounds(processor, bounds)
    return processor


def to_openai(turns: Sequence[Turn], root: Path) -> list[dict[str, Any]]:
    """Return turns as OpenAI messages with images as data URLs.

    Raises:
        BadImage: an image is missing or broken.
    """
    return to_messages(
        turns, lambda path: {"type": "image_url", "image_url": {"url": data_url(path, root)}}
    )


class ChatTemplate:
    """Renders dialogues with a processor's chat template and tokenizes the text."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._special = frozenset(self.tokenizer.all_special_ids)

    def render(self, turns: Sequence[Turn], open_answer: bool = False) -> str:
        """Return the text; ``open_answer`` adds what stands before an answer.

        Raises:
            ValueError: the template refuses the dialogue (e.g. it knows no system turn).
        """
        from jinja2.exceptions import TemplateError

        try:
            text = self.processor.apply_chat_template(
                to_messages(turns, lambda _: {"type": "image"}),
                tokenize=False,
                add_generation_prompt=open_answer,
            )
        except TemplateError as error:
            raise ValueError(f"chat template: {error}") from error
        return str(text)

    def adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer is to add its own (transformers' rule: not if BOS is there)."""
        bos = self.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a rendered text, one id per image placeholder."""
        return list(
            self.tokenizer(text, add_special_tokens=self.adds_special_tokens(text)).input_ids
        )

    def ends_turn(self, token_id: int) -> bool:
        """Whether the token closes a turn: any special token does."""
        return token_id in self._special
