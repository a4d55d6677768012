"""Conversations as the tokens a target sees, with the tokens the assistant wrote marked.

Shapes: L tokens of one sample, image placeholders expanded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_vispec.data.images import BadImage, open_image
from vllm_vispec.data.spans import PlainSample, RoundTripError, plain_sample
from vllm_vispec.data.template import ChatTemplate
from vllm_vispec.data.types import Conversation, Rejected, Turn

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SEQUENCE_OUTPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""Processor outputs with one entry per token: they follow from `Encoded.token_ids`."""


@dataclass(frozen=True)
class Encoded:
    """One sample as the target sees it; it ends with the last token of its last answer.

    ``answer`` marks what the assistant wrote, its end-of-turn token included unless the answer was
    cut off. ``runs`` are the image tokens [start, end), one run per image. ``vision`` holds what
    the target's forward needs beside the ids (``pixel_values``, ``image_grid_thw``, ...), as the
    processor returned it; it is empty without images.
    """

    sample_id: str
    family: str
    token_ids: Tensor
    answer: Tensor
    runs: tuple[tuple[int, int], ...]
    vision: Mapping[str, Tensor]


class Encoder:
    """Turns conversations into `Encoded`, or says why not. Nothing is ever cut.

    Args:
        processor: the target's processor, see `template.load_processor`.
        max_length: most tokens of a sample; longer ones are rejected.
        image_root: folder that relative image paths start from; None: the working directory.
        recorded: take the last answer's tokens from the record (``response_token_ids``) where it
            has them. A sampled answer need not be the tokenizer's own way to write its text, and
            one that was cut off has no end-of-turn token.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int,
        image_root: Path | None = None,
        recorded: bool = True,
    ) -> None:
        self.processor = processor
        self.max_length = max_length
        self.image_root = image_root
        self.recorded = recorded
        self.template = ChatTemplate(processor)
        self.image_token_id = image_token_id(processor)

    def __call__(self, conversation: Conversation) -> Encoded | Rejected:
        """Encode one conversation up to its last answer."""
        try:
            plain = plain_sample(self.template, conversation, self.recorded)
            images = [open_image(path, self.image_root) for path in conversation.images]
            return self._expand(conversation, plain, images)
        except BadImage as error:
            return Rejected(conversation.sample_id, str(error))
        except ValueError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return Rejected(conversation.sample_id, reason)

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        """Return the ids that ask for the next answer, one id per image placeholder."""
        return self.template.tokenize(self.template.render(turns, open_answer=True))

    def _expand(
        self, conversation: Conversation, plain: PlainSample, images: list[Image]
    ) -> Encoded:
        """Expand the image placeholders by the processor's rule."""
        import torch

        marks = plain.token_ids.count(self.image_token_id)
        if marks != len(images):
            raise RoundTripError(
                f"{len(images)} images, but the rendered dialogue has {marks} image tokens"
            )
        outputs = self._process(plain.prompt_text, images)
        counts = iter(self._image_counts(outputs["input_ids"], images))
        is_image = [token == self.image_token_id for token in plain.token_ids]
        repeats = [next(counts) if image else 1 for image in is_image]
        ends = list(accumulate(repeats))
        length = ends[-1]
        if length > self.max_length:
            raise ValueError(f"longer than max_length: {length} tokens, {self.max_length} allowed")
        times = torch.tensor(repeats)
        token_ids = torch.tensor(plain.token_ids).repeat_interleave(times)
        prompt = torch.tensor(outputs["input_ids"])
        if not torch.equal(token_ids[: len(prompt)], prompt):
            raise RoundTripError("the processor does more to the text than repeat image tokens")
        return Encoded(
            sample_id=conversation.sample_id,
            family=conversation.family,
            token_ids=token_ids,
            answer=torch.tensor(plain.answer).repeat_interleave(times),
            runs=tuple(
                (end - count, end)
                for image, count, end in zip(is_image, repeats, ends, strict=True)
                if image
            ),
            vision=outputs["vision"],
        )

    def _process(self, text: str, images: list[Image]) -> dict[str, Any]:
        """Run the processor: ids with expanded placeholders, and its outputs for the images."""
        outputs = self.processor(
            text=[text],
            images=images or None,
            add_special_tokens=self.template.adds_special_tokens(text),
            return_tensors="pt",
        )
        vision = {name: value for name, value in outputs.items() if name not in SEQUENCE_OUTPUTS}
        return {"input_ids": outputs["input_ids"][0].tolist(), "vision": vision}

    def _image_counts(self, expanded: list[int], images: list[Image]) -> list[int]:
        """Return how many tokens each image takes."""
        stretches = groupby(expanded)
        counts = [len(list(same)) for token, same in stretches if token == self.image_token_id]
        if len(counts) == len(images):
            return counts
        # Images that touch form one stretch: ask the processor about each of them alone.
        mark = self.template.tokenizer.convert_ids_to_tokens(self.image_token_id)
        alone = [self._process(mark, [image])["input_ids"] for image in images]
        return [ids.count(self.image_token_id) for ids in alone]


def image_token_id(processor: Any) -> int:
    """Return the id that stands for image features in the expanded prompt."""
    found = getattr(processor, "image_token_id", None)
    if found is None:
        found = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return int(found)
