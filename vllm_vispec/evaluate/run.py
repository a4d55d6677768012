"""`vispec eval`: from files to a report.

Tensor names end in their shape: L tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_vispec.data.encode import Encoder
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import Rejected
from vllm_vispec.draft_vocab.files import find_vocab
from vllm_vispec.evaluate.engine import EngineSettings, Question, measure, questions
from vllm_vispec.evaluate.options import DataSource, EvalOptions, EvalSample
from vllm_vispec.evaluate.report import Report
from vllm_vispec.heads.folder import inspect_head, load_draft
from vllm_vispec.heads.target import check_against_target, load_target_config
from vllm_vispec.reference import Draft
from vllm_vispec.train.batch import Observed, pad_batch
from vllm_vispec.train.metrics import Families, merge_families
from vllm_vispec.train.simulate import simulate
from vllm_vispec.train.target import TrainingTarget
from vllm_vispec.utils.errors import ViSpecError


def evaluate(options: EvalOptions) -> Report:
    """Simulate a head on a data set and, if asked to, measure it with the engine.

    Raises:
        ViSpecError: target, head or data cannot be used, or do not fit each other.
    """
    source = DataSource(options.data, options.image_root, options.limit)
    encoder = Encoder(load_processor(options.target), options.max_length, source.images)
    pair = _Pair.load(options)
    rejected: list[Rejected] = []
    parts: list[Families] = []
    asked: list[Question] = []
    samples = greedy = checked = longest = 0
    for group in source.batches(encoder, options.batch_size, rejected):
        families, matches, tokens = pair.simulate(group, options)
        parts.append(families)
        samples, greedy, checked = samples + len(group), greedy + matches, checked + tokens
        longest = max(longest, *(len(sample.encoded.token_ids) for sample in group))
        if options.engine:
            asked += [question for sample in group for question in questions(encoder, sample)]
    if not samples:
        reason = f" (first reason: {rejected[0].reason})" if rejected else ""
        raise ViSpecError(f"--data {source.path} has no usable conversation{reason}")
    room = pair.room(longest, options.num_speculative_tokens)
    pair.release()
    return Report(
        options.summary(),
        samples,
        tuple(rejected),
        merge_families(*parts),
        (greedy, checked) if options.check_greedy else None,
        measure(_engine(options, room), asked, source.images) if options.engine else None,
        pair.warning,
    )


def _engine(options: EvalOptions, max_model_len: int) -> EngineSettings:
    return EngineSettings(
        options.target,
        options.head,
        options.num_speculative_tokens,
        options.dtype,
        max_model_len,
        options.draft_vocab_setting,
        options.engine_args,
    )


class _Pair:
    """A loaded target with its head."""

    def __init__(
        self,
        target: TrainingTarget,
        draft: Draft,
        warning: str | None = None,
        token_ids: tuple[int, ...] | None = None,
    ) -> None:
        self.target, self.draft, self.warning = target, draft, warning
        self.lm_head_VD, self.token_ids_V = target.lm_head_VD, None
        if token_ids is not None:
            # Ascending as in the engine: of equal logits the same token wins.
            self.token_ids_V = torch.tensor(sorted(token_ids), device=self.lm_head_VD.device)
            self.lm_head_VD = self.lm_head_VD[self.token_ids_V]

    @classmethod
    def load(cls, options: EvalOptions) -> _Pair:
        # Before any weights are read.
        info, config = inspect_head(options.head), load_target_config(options.target)
        text = config.get_text_config()
        warning = check_against_target(
            info.config, text.hidden_size, text.vocab_size, config.model_type
        )
        vocab = find_vocab(options.draft_vocab_setting, info.folder, info.config.vocab_size)
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, options.dtype)
        draft = load_draft(info.folder, dtype).to(device).eval()
        target = TrainingTarget.load(options.target, dtype, device)
        return cls(target, draft, warning, None if vocab is None else vocab.token_ids)

    def simulate(
        self, group: Sequence[EvalSample], options: EvalOptions
    ) -> tuple[Families, int, int]:
        """Acceptance on a few samples, and how many of how many answer tokens are greedy."""
        observed = self.target.observe([sample.encoded for sample in group])
        families = simulate(
            self.draft,
            self.lm_head_VD,
            pad_batch(observed),
            options.num_speculative_tokens,
            self.token_ids_V,
        )
        if not options.check_greedy:
            return families, 0, 0
        counts = [greedy_tokens(one, self.target.lm_head_VD) for one in observed]
        return families, sum(same for same, _ in counts), sum(total for _, total in counts)

    def room(self, longest: int, num_draft_tokens: int) -> int:
        """max_model_len for conversations of up to `longest` tokens.

        vLLM stops drafting for a whole batch as soon as one request, its drafts included, comes
        near max_model_len: the room for two steps keeps the longest one from doing so, where the
        target's own limit allows it.
        """
        wanted = longest + 2 * (num_draft_tokens + 1)
        limit = getattr(self.target.text_config, "max_position_embeddings", None)
        return wanted if limit is None else max(longest, min(wanted, limit))

    def release(self) -> None:
        """Free the memory for the engine."""
        del self.target, self.draft, self.lm_head_VD
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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
