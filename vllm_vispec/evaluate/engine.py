"""Acceptance measured by the engine, on the questions of the same conversations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_vispec.data.encode import Encoder
from vllm_vispec.data.images import open_image
from vllm_vispec.data.types import Turn
from vllm_vispec.evaluate.options import EvalSample
from vllm_vispec.train.metrics import OVERALL, Acceptance, Families, by_family, merge_families
from vllm_vispec.train.simulate import answer_spans
from vllm_vispec.utils.engine_start import spelled_as_json, starting_engine

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class EngineSettings:
    """How to start the engine.

    Attributes:
        dtype: "float32" or "bfloat16"; only float32 is compared token by token.
        max_model_len: longest prompt and answer.
        draft_vocab: what the draft may propose; None: all tokens.
        arguments: further ones of `vllm.LLM`, before all others.
    """

    target: str
    head: str
    num_speculative_tokens: int
    dtype: str = "float32"
    max_model_len: int = 4096
    draft_vocab: str | int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def llm_kwargs(self, eager: bool) -> dict[str, Any]:
        """Keyword arguments of `vllm.LLM`."""
        vocab = {} if self.draft_vocab is None else {"draft_vocab": self.draft_vocab}
        return {
            "model": self.target,
            "dtype": self.dtype,
            "seed": 0,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": max(self.max_model_len, 2048),
            "enforce_eager": eager,
            "disable_log_stats": False,
            "per_request_spec_decode_metrics": "detailed",
            "speculative_config": {
                "method": "vispec",
                "model": self.head,
                "num_speculative_tokens": self.num_speculative_tokens,
                **vocab,
            },
            **self.arguments,
        }


@dataclass(frozen=True)
class Question:
    """What stands before one answer, and the recorded answer."""

    family: str
    prompt_ids: list[int]
    images: tuple[str, ...]
    answer_ids: list[int]


@dataclass(frozen=True)
class Answer:
    """An answer of the engine: its tokens, and the accepted drafts of every step."""

    token_ids: tuple[int, ...]
    accepted: tuple[int, ...]


@dataclass(frozen=True)
class EngineResult:
    """What the engine did.

    Attributes:
        families: acceptance by family and "overall", without draft tokens beyond an answer's end.
        identical: answers equal to the recorded ones, token by token.
        accepted_past_end: accepted draft tokens beyond the end of answers. vLLM's own metric
            counts these, although they are discarded.
    """

    families: Families
    identical: int
    accepted_past_end: int


def questions(encoder: Encoder, sample: EvalSample) -> Iterator[Question]:
    """One question per answer, the recorded earlier answers in its prompt."""
    turns = sample.conversation.turns
    asked = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    spans = answer_spans(sample.encoded.answer.tolist())
    for index, (start, end) in zip(asked, spans, strict=True):
        yield Question(
            sample.encoded.family,
            encoder.prompt_ids(turns[:index]),
            _images(turns[:index]),
            sample.encoded.token_ids[start:end].tolist(),
        )


def _images(turns: Sequence[Turn]) -> tuple[str, ...]:
    return tuple(part.image for turn in turns for part in turn.parts if part.image)


def measure(
    settings: EngineSettings, asked: Sequence[Question], image_root: Path | None
) -> EngineResult:
    """Ask the engine every question and compare with the recorded answers."""
    with open_engine(settings) as llm:
        answers = ask(llm, asked, image_root)
    return summarise(asked, answers, settings.num_speculative_tokens)


@contextmanager
def open_engine(settings: EngineSettings) -> Iterator[LLM]:
    """A running engine with the head.

    Raises:
        ViSpecError: it does not start, with the cause.
    """
    import torch
    from vllm import LLM

    from vllm_vispec.plugin import register

    register()
    with starting_engine(settings.target, spelled_as_json("--engine-args")):
        llm = LLM(**settings.llm_kwargs(eager=not torch.cuda.is_available()))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def ask(llm: LLM, asked: Sequence[Question], image_root: Path | None) -> list[Answer]:
    """Greedy answers, cut at the length of the recorded ones at the latest."""
    from vllm import SamplingParams

    prompts = [_prompt(question, image_root) for question in asked]
    params = [
        SamplingParams(temperature=0.0, max_tokens=len(question.answer_ids)) for question in asked
    ]
    outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
    return [
        Answer(tuple(one.token_ids), tuple(one.spec_decode_metrics.per_step_accepted))
        for one in outputs
    ]


def _prompt(question: Question, image_root: Path | None) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt_token_ids": question.prompt_ids}
    if question.images:
        images = [open_image(path, image_root) for path in question.images]
        prompt["multi_modal_data"] = {"image": images}
    return prompt


def summarise(
    asked: Sequence[Question], answers: Sequence[Answer], num_draft_tokens: int
) -> EngineResult:
    """Sum up the answers to all questions."""
    results: list[Families] = [{OVERALL: Acceptance.nothing(num_draft_tokens)}]
    identical = past_end = 0
    for question, answer in zip(asked, answers, strict=True):
        kept = inside_answer(answer.accepted, len(answer.token_ids))
        past_end += sum(answer.accepted) - sum(kept)
        identical += list(answer.token_ids) == question.answer_ids
        one = Acceptance.of_answer(kept, len(answer.token_ids), num_draft_tokens)
        results.append(by_family(question.family, one))
    return EngineResult(merge_families(*results), identical, past_end)


def inside_answer(accepted: Sequence[int], num_tokens: int) -> list[int]:
    """Return the accepted draft tokens of every step without those beyond the answer's end.

    The scheduler counts a step before it looks for the stop token.
    """
    kept: list[int] = []
    left = num_tokens - 1
    for count in accepted:
        kept.append(min(count, left))
        left -= min(count + 1, left)
    return kept
