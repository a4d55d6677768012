"""Drafting with a published model on the V1 model runner; `draft_model.speculator` says how."""

from typing import Any

import torch
from torch import nn

from vllm_vispec.draft_model.rows import PublishedRows
from vllm_vispec.v1.proposer import ViSpecProposer
from vllm_vispec.v1.tree_proposer import TreeProposer


class PublishedProposer(ViSpecProposer):
    """vLLM's EAGLE proposer with one step more, whose first pass samples nothing."""

    draft_rows: PublishedRows  # type: ignore[assignment]
    _last_draft_probs: torch.Tensor | None
    # The tokens that the target sampled, while the first pass runs.
    _next_tokens: torch.Tensor | None = None

    def load_model(self, target_model: nn.Module) -> None:
        """Load the draft, and let its vision tower run with the target's."""
        super().load_model(target_model)
        self.model.follow_tower(target_model)

    def make_draft_rows(self) -> PublishedRows:
        """Return what lays a batch's rows out."""
        rows: PublishedRows = self.model.make_rows()
        return rows

    def propose(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return drafts ``[R, K]``."""
        count = num_speculative_tokens
        drafts = super().propose(count + 1 if count else 0, *args, **kwargs)
        self.num_speculative_tokens = count
        if self._last_draft_probs is not None:
            self._last_draft_probs = self._last_draft_probs[:, 1:]
        return drafts[:, 1:] if count else drafts

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        """Run as many passes as a step, as other data-parallel ranks wait for each of them."""
        self.num_speculative_tokens += 1
        super().dummy_run(*args, **kwargs)
        self.num_speculative_tokens -= 1

    def set_inputs_first_pass(self, *args: Any, **kwargs: Any) -> Any:
        """Undo the shift by one token that heads need."""
        num_tokens, token_indices, metadata = super().set_inputs_first_pass(*args, **kwargs)
        self._next_tokens = kwargs["next_token_ids"].long()
        self.input_ids[:num_tokens] = kwargs["target_token_ids"]
        return num_tokens, token_indices, metadata

    def _set_positions(self, num_tokens: int, positions: torch.Tensor) -> None:
        """Take plain positions, and the target's M-RoPE positions ``[A, T]`` if it has any."""
        super()._set_positions(num_tokens, positions)
        if self.model.positions is not None and self.model.sees_images:
            self.model.positions.set_step(positions, self.positions[:num_tokens])

    def build_model_inputs_first_pass(
        self, num_tokens: int, num_input_tokens: int, mm_embed_inputs: Any
    ) -> Any:
        """Give the first pass the draft's own image features; levels of trees have none."""
        is_first_pass = self._next_tokens is not None
        return super().build_model_inputs_first_pass(
            num_tokens, num_input_tokens, self.draft_rows.features if is_first_pass else None
        )

    def _sample_draft_tokens(
        self, hidden_states: torch.Tensor, sampling_metadata: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the target's token behind the first pass, else the draft's."""
        next_tokens, self._next_tokens = self._next_tokens, None
        if next_tokens is None:
            return super()._sample_draft_tokens(hidden_states, sampling_metadata)
        if not self._enable_probabilistic_draft_probs or sampling_metadata.all_greedy:
            return next_tokens, None
        # vLLM stacks what all passes return, and `propose` drops what this one does.
        shape = len(next_tokens), self.model.config.vocab_size
        return next_tokens, hidden_states.new_zeros(1, 1, dtype=torch.float32).expand(shape)

    def _maybe_share_embeddings(self, target_language_model: nn.Module) -> None:
        """Share nothing: the draft has an embedding table of its own."""

    def _maybe_share_lm_head(self, target_language_model: nn.Module) -> None:
        """Share nothing: the draft has an lm_head of its own."""


class PublishedTreeProposer(TreeProposer, PublishedProposer):
    """Grows trees from the tokens that the target sampled last, behind a one-token step."""

    def _sample_draft_tokens(
        self, hidden_states: torch.Tensor, sampling_metadata: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the target's token behind the first pass; the root is the next one's."""
        is_first_pass = self._next_tokens is not None
        sampling = PublishedProposer if is_first_pass else TreeProposer
        return sampling._sample_draft_tokens(self, hidden_states, sampling_metadata)
