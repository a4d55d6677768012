"""Run the target and heads over recorded answers, and keep attention to images.

Tensor names end in their shape: B samples, H heads, L query rows, M keys, S passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.compressors.held_out import BATCH_SIZE, MAX_LENGTH
from vllm_vispec.errors import ViSpecError

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_vispec.conversations.encode import Encoded
    from vllm_vispec.torch_draft import ViSpecDraft
    from vllm_vispec.train.batch import Observed
    from vllm_vispec.train.target import TrainingTarget

# Which row of the target is asked. "accepted" is ViSkip's, the last one the target has run when a
# round begins, and made the round's last known token. "pending" is that token's own row, which a
# gate can only have a pass later: here to see what the best informed gate would know.
ROWS: Mapping[str, int] = {"accepted": 0, "pending": 1}


@dataclass(frozen=True)
class Turn:
    """One answer; its place i is behind its token i, where a round may begin.

    Attributes:
        family: task family.
        accepted: for every place (N of them), drafts that a round from there accepts.
        visual: per layer [N + 1], attention to image keys of the row that made token i.
    """

    family: str
    accepted: tuple[int, ...]
    visual: Mapping[int, NDArray[np.float64]]

    def scores(self, layer: int, row: str) -> NDArray[np.float64]:
        """What a gate reads at every place: [N]."""
        first = ROWS[row]
        return self.visual[layer][first : first + len(self.accepted)]


Sample = Sequence[Turn]  # a conversation: its answers


def look(
    target: str, heads: Sequence[str], answers: Path, limit: int | None, num_draft_tokens: int
) -> dict[str, list[Sample]]:
    """What every head would accept, and what every layer of the target looks at.

    Args:
        answers: conversations with the target's greedy answers; those without images are left out.
        limit: most conversations to read.

    Returns:
        For every head its samples, in the order of the file.

    Raises:
        ViSpecError: the target, a head or the data cannot be used.
    """
    import torch

    from vllm_vispec.conversations.encode import Encoder, load_processor
    from vllm_vispec.evaluate.data import DataSource
    from vllm_vispec.torch_draft import ViSpecDraft
    from vllm_vispec.train.target import TrainingTarget

    source = DataSource(answers, limit=limit)
    model = TrainingTarget.load(target, torch.float32, "cpu")
    drafts = {head: ViSpecDraft.from_folder(Path(head)).eval() for head in heads}
    encoder = Encoder(load_processor(target), MAX_LENGTH, source.images)
    found: dict[str, list[Sample]] = {head: [] for head in heads}
    for group in source.batches(encoder, BATCH_SIZE, []):
        encoded = [sample.encoded for sample in group if sample.encoded.runs]
        if not encoded:
            continue
        with attention_to(model, image_keys(encoded)) as visual:
            observed = model.observe(encoded)
        for head, draft in drafts.items():
            found[head] += samples_of(draft, model, observed, visual, num_draft_tokens)
    return found


def image_keys(samples: Sequence[Encoded]) -> Tensor:
    """Where the images are: bool [B, M], padded on the right as the target pads."""
    import torch

    keys_BM = torch.zeros(len(samples), max(len(one.token_ids) for one in samples)).bool()
    for number, sample in enumerate(samples):
        for start, end in sample.runs:
            keys_BM[number, start:end] = True
    return keys_BM


@contextmanager
def attention_to(model: TrainingTarget, keys_BM: Tensor) -> Iterator[dict[int, Tensor]]:
    """Collect per layer, of every row, the attention to some keys: sum over them, mean over heads.

    Raises:
        ViSpecError: the target's attention does not give its weights away.
    """
    # The fused kernels never have the weights.
    model.model.set_attn_implementation("eager")
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if output[1] is None:
                raise ViSpecError(
                    f"layer {layer} of {model.folder} returns no attention weights: use a target "
                    "that transformers can run with attn_implementation='eager'"
                )
            weights_BHLM = output[1]
            seen[layer] = (weights_BHLM * keys_BM[:, None, None, :]).sum(-1).mean(1)

        return hook

    layers = model.model.model.language_model.layers
    handles = [
        layer.self_attn.register_forward_hook(keep(number)) for number, layer in enumerate(layers)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def samples_of(
    draft: ViSpecDraft,
    model: TrainingTarget,
    observed: Sequence[Observed],
    visual: dict[int, Tensor],
    num_draft_tokens: int,
) -> list[Sample]:
    """The answers of a batch with a head's drafts; `visual` is [B, L] per layer."""
    import torch

    from vllm_vispec.evaluate.simulate import answer_spans, draft_hits
    from vllm_vispec.train.batch import pad_batch

    with torch.inference_mode():
        hits_SBL = draft_hits(draft, model.lm_head_VD, pad_batch(observed), num_draft_tokens)
    found: list[Sample] = []
    for number, one in enumerate(observed):
        rows = {layer: rows_BL[number].double().numpy() for layer, rows_BL in visual.items()}
        hits = hits_SBL[:, number].tolist()
        found.append(
            [
                # The row before the answer made its first token.
                Turn(
                    one.family,
                    accepted_from(hits, start, end),
                    {layer: row[start - 1 : end - 1] for layer, row in rows.items()},
                )
                for start, end in answer_spans(one.answer.tolist())
            ]
        )
    return found


def accepted_from(hits: Sequence[Sequence[bool]], start: int, end: int) -> tuple[int, ...]:
    """Drafts that a round accepts which begins behind each token of [start, end - 1)."""
    from vllm_vispec.evaluate.simulate import replay

    return tuple(replay(hits, known, end)[0] for known in range(start, end - 1))
