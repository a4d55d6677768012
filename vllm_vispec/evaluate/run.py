"""`vispec eval`: from files to a report.

Tensor names end in their shape: L tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from vllm_vispec.config import read_images
from vllm_vispec.data.encode import Encoder
from vllm_vispec.data.image_bounds import (
    Bounds,
    bounds_in,
    recorded_bounds,
    same_bounds,
    set_bounds,
)
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import Conversation, Rejected
from vllm_vispec.draft_model.named import find_published, sees_images
from vllm_vispec.draft_vocab.files import find_vocab
from vllm_vispec.evaluate.engine import Question, measure, questions
from vllm_vispec.evaluate.options import EvalOptions, EvalSample, read_samples
from vllm_vispec.evaluate.report import Report
from vllm_vispec.heads.card import trained_bounds
from vllm_vispec.heads.folder import HeadInfo, inspect_head, load_draft
from vllm_vispec.heads.location import resolve_head
from vllm_vispec.heads.target import check_against_target, load_target_config, target_dtype
from vllm_vispec.reference import Draft
from vllm_vispec.spec_decode.low_acceptance import LOW
from vllm_vispec.train.acceptance import Acceptance, Answers, by_family, simulate
from vllm_vispec.train.published import PublishedModel
from vllm_vispec.train.target import Observed, TrainingTarget, pad_batch
from vllm_vispec.utils.errors import ViSpecError


def evaluate(options: EvalOptions) -> Report:
    """Simulate a draft on a data set and, if asked to, measure it with the engine.

    Raises:
        ViSpecError: target, head or data cannot be used, or do not fit each other.
    """
    if options.dtype == "auto":
        options = options.model_copy(update={"dtype": target_dtype(options.target)})
    processor = load_processor(options.target)
    options = options.model_copy(update=set_bounds(processor, image_bounds(options)))
    encoder = Encoder(processor, options.max_length, options.image_folder)
    pair = _Pair(options)
    rejected: list[Rejected] = []
    answers: list[tuple[str, Acceptance]] = []
    asked: list[Question] = []
    samples = greedy = checked = longest = 0
    every = read_samples(options.data, encoder, rejected, options.limit)
    while group := list(islice(every, options.batch_size)):
        found, matches, tokens = pair.simulate(group, options)
        answers += found
        samples, greedy, checked = samples + len(group), greedy + matches, checked + tokens
        longest = max(longest, *(len(sample.encoded.token_ids) for sample in group))
        if options.engine:
            asked += [question for sample in group for question in questions(encoder, sample)]
    if not samples:
        reason = f" (first reason: {rejected[0].reason})" if rejected else ""
        raise ViSpecError(f"--data {options.data} has no usable conversation{reason}")
    room, warning = pair.room(longest, options.num_speculative_tokens), pair.warning
    break_even = pair.break_even(options.num_speculative_tokens)
    del pair  # frees the memory for the engine
    gc.collect()
    torch.cuda.empty_cache()
    return Report(
        options,
        samples,
        tuple(rejected),
        by_family(answers, options.num_speculative_tokens),
        greedy / max(checked, 1) if options.check_greedy else None,
        measure(options, asked, room) if options.engine else None,
        warning,
        break_even,
    )


def image_bounds(options: EvalOptions) -> Bounds:
    """Return the bounds to read images with: those given, else the head's, else the data's.

    Raises:
        ViSpecError: the answers were made with others.
    """
    given, where = bounds_in(vars(options)), f"--data {options.data}"
    of_head = trained_bounds(resolve_head(options.head))
    read = islice(read_conversations(options.data, options.image_folder), options.limit)
    conversations = (one for one in read if isinstance(one, Conversation))
    recorded = recorded_bounds(conversations, where, given or of_head)
    if given:
        return same_bounds(given, recorded, where)
    return same_bounds(of_head, recorded, where, f"--head {options.head} was trained with")


class _Pair:
    """A loaded target with its head; `warning` says why they may not fit."""

    def __init__(self, options: EvalOptions) -> None:
        # Before any weights are read.
        published = find_published(options.head, options.target)
        info, config = published or inspect_head(options.head), load_target_config(options.target)
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, options.dtype)
        self.warning, vocab = None, None
        if published is not None:
            draft = _load_published(published, options, dtype)
        elif options.images is not None:
            raise ViSpecError("--images does not go with a head; leave it out")
        else:
            text = config.get_text_config()
            self.warning = check_against_target(
                info.config, text.hidden_size, text.vocab_size, config.model_type
            )
            vocab = find_vocab(options.draft_vocab_setting, info.folder, info.config.vocab_size)
            draft = load_draft(info.folder, dtype)
        self.draft = draft.to(device).eval()
        self.target = TrainingTarget.load(options.target, dtype, device)
        self.lm_head_VD, self.token_ids_V = self.target.lm_head_VD, None
        if vocab is not None:
            # Ascending as in the engine: of equal logits the same token wins.
            self.token_ids_V = torch.tensor(sorted(vocab.token_ids), device=device)
            self.lm_head_VD = self.lm_head_VD[self.token_ids_V]

    def simulate(
        self, group: Sequence[EvalSample], options: EvalOptions
    ) -> tuple[Answers, int, int]:
        """Acceptance on a few samples, and how many of how many answer tokens are greedy."""
        observed = self.target.observe([sample.encoded for sample in group])
        answers = simulate(
            self.draft,
            self.lm_head_VD,
            pad_batch(observed),
            options.num_speculative_tokens,
            self.token_ids_V,
        )
        checked = observed if options.check_greedy else []
        counts = [greedy_tokens(one, self.target.lm_head_VD) for one in checked]
        return answers, sum(same for same, _ in counts), sum(total for _, total in counts)

    def room(self, longest: int, num_draft_tokens: int) -> int:
        """max_model_len for conversations of up to `longest` tokens.

        vLLM stops drafting for a whole batch as soon as one request, its drafts included, comes
        near max_model_len: the room for two steps keeps the longest one from doing so, where the
        target's own limit allows it.
        """
        wanted = longest + 2 * (num_draft_tokens + 1)
        limit = getattr(self.target.text_config, "max_position_embeddings", None)
        return wanted if limit is None else max(longest, min(wanted, limit))

    def break_even(self, num_draft_tokens: int) -> float:
        """Acceptance length at which drafting costs what it saves; never below `LOW`.

        For one request, where a pass takes as long as its weights take to read, lm_head included:
        a step has so many draft passes beside the target's.
        """

        def read(module: torch.nn.Module, lm_head_VD: Tensor) -> int:
            skipped = ("embed_tokens", "lm_head", "visual", "vision")
            weights = {
                name: one.numel()
                for name, one in module.named_parameters()
                if not any(part in name for part in skipped)
            }
            return sum(weights.values()) + lm_head_VD.numel()

        target = read(self.target.model.model.language_model, self.target.lm_head_VD)
        return max(1 + num_draft_tokens * read(self.draft, self.lm_head_VD) / target, LOW)


def _load_published(info: HeadInfo, options: EvalOptions, dtype: torch.dtype) -> Draft:
    if options.draft_vocab is not None:
        raise ViSpecError("--draft-vocab does not go with a published model; leave it out")
    if options.images not in (None, "none") and not sees_images(info):
        raise ViSpecError(f"--images {options.images} does not go with a text model; leave it out")
    return PublishedModel.load(info, dtype, share=read_images(options.images))


def greedy_tokens(sample: Observed, lm_head_VD: Tensor) -> tuple[int, int]:
    """How many answer tokens are the target's argmax given all before them, and how many exist."""
    wanted_L = sample.answer[1:]
    states_ND = sample.hidden_LD[:-1][wanted_L]
    gold_N = sample.token_ids[1:][wanted_L]
    same = sum(
        int(((states @ lm_head_VD.T).argmax(-1) == gold).sum())
        for states, gold in zip(states_ND.split(512), gold_N.split(512), strict=True)
    )
    return same, len(gold_N)
