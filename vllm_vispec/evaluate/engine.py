"""Acceptance measured by the engine, on the questions of the same conversations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_vispec.data.encode import Encoder
from vllm_vispec.data.image_bounds import bounds_in
from vllm_vispec.data.images import open_image
from vllm_vispec.evaluate.options import EvalOptions, EvalSample
from vllm_vispec.train.acceptance import Acceptance, Families, answer_spans, by_family
from vllm_vispec.utils.engine_start import spelled_as_json, starting_engine

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class Question:
    """What stands before one answer, and the recorded answer."""

    family: str
    prompt_ids: list[int]
    images: tuple[str, ...]
    answer_ids: list[int]


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
            tuple(part.image for turn in turns[:index] for part in turn.parts if part.image),
            sample.encoded.token_ids[start:end].tolist(),
        )


def measure(options: EvalOptions, asked: Sequence[Question], max_model_len: int) -> EngineResult:
    """Ask the engine every question, greedily, and compare with the recorded answers.

    Answers are cut at the length of the recorded ones at the latest.

    Args:
        max_model_len: longest prompt and answer.

    Raises:
        ViSpecError: the engine does not start, with the cause.
    """
    from vllm import SamplingParams

    depth = options.num_speculative_tokens
    found: list[tuple[str, Acceptance]] = []
    identical = past_end = 0
    with _open_engine(options, max_model_len) as llm:
        params = [SamplingParams(temperature=0.0, max_tokens=len(x.answer_ids)) for x in asked]
        outputs = llm.generate(
            [_prompt(question, options.image_folder) for question in asked], params
        )
    for question, output in zip(asked, outputs, strict=True):
        answer = output.outputs[0]
        accepted, length = answer.spec_decode_metrics.per_step_accepted, len(answer.token_ids)
        inside = inside_answer(accepted, length)
        past_end += sum(accepted) - sum(inside)
        identical += list(answer.token_ids) == question.answer_ids
        found.append((question.family, Acceptance.of_answer(inside, length, depth)))
    return EngineResult(by_family(found, depth), identical, past_end)


@contextmanager
def _open_engine(options: EvalOptions, max_model_len: int) -> Iterator[LLM]:
    import torch
    from vllm import LLM

    from vllm_vispec.plugin import register

    speculative: dict[str, Any] = {
        "method": "vispec",
        "model": options.head,
        "num_speculative_tokens": options.num_speculative_tokens,
        # Acceptance is counted at every position.
        "adaptive": False,
        "draft_vocab": options.draft_vocab_setting,
        "images": options.images,
    }
    settings: dict[str, Any] = {
        "model": options.target,
        "mm_processor_kwargs": bounds_in(vars(options)) or None,
        "dtype": options.dtype,
        "seed": 0,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max(max_model_len, 2048),
        "enforce_eager": not torch.cuda.is_available(),
        "disable_log_stats": False,
        "per_request_spec_decode_metrics": "detailed",
        "speculative_config": {k: v for k, v in speculative.items() if v is not None},
    }
    register()
    with starting_engine(options.target, spelled_as_json("--engine-args")):
        llm = LLM(**settings | options.engine_args)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def _prompt(question: Question, image_root: Path) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt_token_ids": question.prompt_ids}
    if question.images:
        images = [open_image(path, image_root) for path in question.images]
        prompt["multi_modal_data"] = {"image": images}
    return prompt


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
