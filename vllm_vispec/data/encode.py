"""Conversations as the tokens a target sees, with the tokens the assistant wrote marked.

A dialogue is rendered once; an answer starts where the rendering of everything before it (with the
opening of an answer) ends. A template for which that is no prefix of the whole, in text or in
tokens, does not round-trip: what it would be trained on is not what the engine sees. Then the image
placeholders are expanded by the processor's rule.

Shapes: L tokens of one sample, image placeholders expanded.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_vispec.data.images import image_file, image_size, open_image
from vllm_vispec.data.template import ChatTemplate
from vllm_vispec.data.types import ANSWER_TOKENS_KEY, FINISH_KEY, Conversation, Rejected, Turn
from vllm_vispec.utils.errors import first_line

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

NO_LIMIT = 1 << 30
SEQUENCE_OUTPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""Processor outputs with one entry per token: they follow from `Encoded.token_ids`."""


@dataclass(frozen=True)
class Encoded:
    """One sample as the target sees it; it ends with the last token of its last answer.

    ``token_ids`` int64 [L]; ``answer`` bool [L] marks what the assistant wrote, its end-of-turn
    token included unless the answer was cut off. ``runs`` are the image tokens [start, end), one
    run per image, or several where other tokens stand between its rows or tiles. ``vision`` holds
    what the target's forward needs beside the ids (``pixel_values``, ``image_grid_thw``, ...), as
    the processor returned it; empty without images. ``images`` are their files.
    """

    sample_id: str
    family: str
    token_ids: Tensor
    answer: Tensor
    runs: tuple[tuple[int, int], ...]
    vision: Mapping[str, Tensor]
    images: tuple[Path, ...] = ()

    def pin_memory(self) -> Encoded:
        """Return it in memory that a GPU reads directly, as torch's DataLoader asks for."""
        vision = {name: value.pin_memory() for name, value in self.vision.items()}
        return replace(
            self,
            token_ids=self.token_ids.pin_memory(),
            answer=self.answer.pin_memory(),
            vision=vision,
        )


@dataclass(frozen=True)
class Measured:
    """How many tokens a sample has, and how many of these are its images'."""

    tokens: int
    image_tokens: int


@dataclass(frozen=True)
class PlainSample:
    """A dialogue with one token per image: ids, answer marks, and the text it was asked with."""

    token_ids: list[int]
    answer: list[bool]
    prompt_text: str


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
        max_length: int = NO_LIMIT,
        image_root: Path | None = None,
        recorded: bool = True,
    ) -> None:
        self.processor = processor
        self.max_length = max_length
        self.image_root = image_root
        self.recorded = recorded
        self.template = ChatTemplate(processor)
        self.image_token_id = _image_token_id(processor)

    def __call__(self, conversation: Conversation) -> Encoded | Rejected:
        """Encode one conversation up to its last answer."""
        try:
            plain = plain_sample(self.template, conversation, self.recorded)
            images = [open_image(path, self.image_root) for path in conversation.images]
            return self._expand(conversation, plain, images)
        except ValueError as error:
            return Rejected(conversation.sample_id, first_line(error))

    def measure(self, conversation: Conversation) -> Measured | Rejected:
        """Count a sample's tokens by the sizes of its images, whatever `max_length`.

        Images must decode, but no pixels are processed where the processor knows their tokens
        without. What a processor does to the text beside repeating image tokens is not seen.
        """
        if conversation.images and not self.counts_by_size:
            return measured(self(conversation))
        try:
            token_ids = self.ids_by_size(conversation)
        except ValueError as error:
            return Rejected(conversation.sample_id, first_line(error))
        return Measured(len(token_ids), token_ids.count(self.image_token_id))

    @property
    def counts_by_size(self) -> bool:
        """Whether the processor knows an image's tokens by its size."""
        return hasattr(self.processor, "_get_num_multimodal_tokens")

    def ids_by_size(self, conversation: Conversation) -> list[int]:
        """Return a sample's ids by the sizes of its images, as `measure` counts them.

        Raises:
            ValueError: it cannot be encoded.
        """
        plain = plain_sample(self.template, conversation, self.recorded)
        self._check_marks(plain, len(conversation.images))
        sizes = [image_size(path, self.image_root) for path in conversation.images]
        # transformers' interface for this, which vLLM uses too; without a public name.
        ask = self.processor._get_num_multimodal_tokens
        counts = iter(ask(image_sizes=sizes).num_image_tokens if sizes else ())
        return [
            token
            for token in plain.token_ids
            for _ in range(next(counts) if token == self.image_token_id else 1)
        ]

    def _check_marks(self, plain: PlainSample, images: int) -> None:
        marks = plain.token_ids.count(self.image_token_id)
        if marks != images:
            raise ValueError(f"{images} images, but the rendered dialogue has {marks} image tokens")

    def prompt_ids(self, turns: Sequence[Turn]) -> list[int]:
        """Return the ids that ask for the next answer, one id per image placeholder."""
        return self.template.tokenize(self.template.render(turns, open_answer=True))

    def _expand(
        self, conversation: Conversation, plain: PlainSample, images: list[Image]
    ) -> Encoded:
        """Expand the image placeholders by the processor's rule."""
        import torch

        self._check_marks(plain, len(images))
        prompt_ids, vision = self._process(plain.prompt_text, images)
        for expansions in self._expansions(prompt_ids, images):
            following = iter(expansions)
            pieces = [
                next(following) if token == self.image_token_id else [token]
                for token in plain.token_ids
            ]
            token_ids = list(chain.from_iterable(pieces))
            if token_ids[: len(prompt_ids)] == prompt_ids:
                break
        else:
            raise ValueError("the processor does more to the text than replace image tokens")
        runs = tuple(self._runs(pieces))
        if len(token_ids) > self.max_length:
            of_images = sum(end - start for start, end in runs)
            raise ValueError(too_long(Measured(len(token_ids), of_images), self.max_length))
        repeats = torch.tensor([len(piece) for piece in pieces])
        return Encoded(
            sample_id=conversation.sample_id,
            family=conversation.family,
            token_ids=torch.tensor(token_ids),
            answer=torch.tensor(plain.answer).repeat_interleave(repeats),
            runs=runs,
            vision=vision,
            images=tuple(image_file(path, self.image_root) for path in conversation.images),
        )

    def _runs(self, pieces: Iterable[list[int]]) -> Iterator[tuple[int, int]]:
        """Return where image tokens stand, [start, end); images that touch are kept apart."""
        start = 0
        for piece in pieces:
            for is_image, same in groupby(piece, lambda token: token == self.image_token_id):
                end = start + len(list(same))
                if is_image:
                    yield start, end
                start = end

    def _process(
        self, text: str, images: list[Image], special: bool | None = None
    ) -> tuple[list[int], dict[str, Tensor]]:
        """Run the processor: ids with expanded placeholders, and its outputs for the images."""
        outputs = self.processor(
            text=[text],
            images=images or None,
            add_special_tokens=self.template.adds_special_tokens(text)
            if special is None
            else special,
            return_tensors="pt",
        )
        vision = {name: value for name, value in outputs.items() if name not in SEQUENCE_OUTPUTS}
        return outputs["input_ids"][0].tolist(), vision

    def _expansions(self, expanded: list[int], images: list[Image]) -> Iterator[list[list[int]]]:
        """Return what the image tokens may have become: one list of ids for each image.

        Most processors repeat them. Some put others before, between and behind, and images that
        touch form one stretch: then the processor is asked about each image alone.
        """
        stretches = groupby(expanded)
        found = [list(same) for token, same in stretches if token == self.image_token_id]
        if len(found) == len(images):
            yield found
        mark = self.template.tokenizer.convert_ids_to_tokens(self.image_token_id)
        yield [self._process(mark, [one], special=False)[0] for one in images]


def measured(item: Encoded | Rejected) -> Measured | Rejected:
    """Return the token counts of an encoded sample."""
    if isinstance(item, Rejected):
        return item
    return Measured(len(item.token_ids), sum(end - start for start, end in item.runs))


def too_long(found: Measured, limit: int) -> str:
    """Return why a sample with more tokens than this is left out."""
    of_images = f", {found.image_tokens} of its images alone"
    return f"longer than max_length: {found.tokens} tokens, {limit} allowed" + (
        of_images if found.image_tokens > limit else ""
    )


def _image_token_id(processor: Any) -> int:
    """Return the id that stands for image features in the expanded prompt."""
    found = getattr(processor, "image_token_id", None)
    if found is None:
        found = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return int(found)


def plain_sample(template: ChatTemplate, conversation: Conversation, recorded: bool) -> PlainSample:
    """Return the tokens of a dialogue up to its last answer.

    Raises:
        ValueError: the template does not keep a prefix a prefix, there is no answer, an empty one,
            or the record contradicts the dialogue.
    """
    turns = _until_last_answer(conversation)
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    tokens = _recorded_answer(conversation, len(answers)) if recorded else None
    cut = _cut_off(conversation, len(answers))
    prompt_text = template.render(turns[:-1], open_answer=True)
    text = prompt_text if tokens else template.render(turns)
    ids = template.tokenize(text)
    marks = [False] * len(ids)
    end = len(ids)
    for number, index in enumerate(answers[:-1] if tokens else answers):
        start, end = _span(template, turns, index, text, ids)
        if end < len(ids) and template.ends_turn(ids[end]) and not cut[number]:
            end += 1
        marks[start:end] = [True] * (end - start)
    if tokens:
        return PlainSample(ids + tokens, marks + [True] * len(tokens), prompt_text)
    return PlainSample(ids[:end], marks[:end], prompt_text)


def _recorded_answer(conversation: Conversation, answers: int) -> list[int] | None:
    """Return the recorded ids of the last answer, None if the record has none."""
    found = conversation.extra.get(ANSWER_TOKENS_KEY)
    if not found:
        return None
    if not isinstance(found, list) or len(found) != answers:
        raise ValueError(f"{ANSWER_TOKENS_KEY} is not one list for each of {answers} answers")
    last = found[-1]
    if last is None:
        return None
    is_ids = isinstance(last, list | array) and all(type(one) is int for one in last)
    if not is_ids or not last:
        raise ValueError(f"{ANSWER_TOKENS_KEY} holds no token ids for the last answer")
    return list(last)


def _until_last_answer(conversation: Conversation) -> tuple[Turn, ...]:
    """Return the turns up to the last answer: later ones teach nothing."""
    turns = conversation.turns
    while turns and turns[-1].role != "assistant":
        turns = turns[:-1]
    if not turns:
        raise ValueError("no answer")
    if all(turn.role != "user" for turn in takewhile(lambda turn: turn.role != "assistant", turns)):
        raise ValueError("an answer without a question before it")
    for turn in turns:
        if turn.role == "assistant" and any(part.image for part in turn.parts):
            raise ValueError("an answer holds an image")
        if turn.role == "assistant" and not turn.text.strip():
            raise ValueError("empty answer")
    if any(part.image for turn in conversation.turns[len(turns) :] for part in turn.parts):
        raise ValueError("an image without an answer after it")
    return turns


def _cut_off(conversation: Conversation, answers: int) -> list[bool]:
    """Return, for each answer, whether the token limit ended it."""
    reasons = conversation.extra.get(FINISH_KEY)
    if not isinstance(reasons, list) or len(reasons) != answers:
        return [False] * answers
    return [reason == "length" for reason in reasons]


def _span(
    template: ChatTemplate, turns: Sequence[Turn], index: int, text: str, ids: list[int]
) -> tuple[int, int]:
    """Return the tokens [start, end) of an answer, without what closes the turn."""
    prefix = template.render(turns[:index], open_answer=True)
    if not text.startswith(prefix):
        raise ValueError(f"chat template: the text before turn {index} is no prefix")
    before = template.tokenize(prefix)
    if ids[: len(before)] != before:
        raise ValueError(f"chat template: the tokens before turn {index} are no prefix")
    end = _answer_end(text, len(prefix), turns[index].text)
    pairs = zip(ids, template.tokenize(text[:end]), strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if shared <= len(before):
        raise ValueError(f"chat template: the answer in turn {index} has no token of its own")
    return len(before), shared


def _answer_end(text: str, start: int, answer: str) -> int:
    """Return the character after the answer; templates may strip it."""
    for wanted in (answer, answer.strip()):
        found = text.find(wanted, start)
        # Only white space may stand between the opening and the answer.
        if found >= 0 and not text[start:found].strip():
            return found + len(wanted)
    raise ValueError("chat template: it changes the text of an answer")
