"""Heads on the held-out questions without an engine: acceptance by replay, and gates' choices.

Replaying greedy chains over the target's greedy answers gives what the engine accepts, in float32
exactly, at a fraction of its time: so these numbers are over more questions than the engine's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.ablation.arms import Cell
from benchmarks.ablation.measure import NUM_DRAFT_TOKENS
from benchmarks.ablation.workspace import Workspace
from benchmarks.compressors.choices import (
    choices_file,
    choose_by_family,
    load_compressor,
    question_states,
)
from vllm_vispec.utils.files import write_json

if TYPE_CHECKING:
    from vllm_vispec.heads.folder import load_draft
    from vllm_vispec.reference import ViSpecDraft
    from vllm_vispec.train.batch import Observed
    from vllm_vispec.train.target import TrainingTarget

MAX_LENGTH, BATCH_SIZE = 1024, 8


@dataclass(frozen=True)
class Replayed:
    """One conversation.

    Attributes:
        accepted: accepted draft tokens of every round of its answers.
    """

    family: str
    accepted: tuple[int, ...]


def replayed_file(workspace: Workspace, cell: Cell) -> Path:
    """What was found for a head."""
    return workspace.root / "replayed" / f"{cell.name}.json"


def read_replayed(file: Path) -> list[Replayed]:
    """What `replay_all` wrote."""
    return [Replayed(one["family"], tuple(one["accepted"])) for one in json.loads(file.read_text())]


def look_at_held_out(workspace: Workspace, target: str, cells: Iterable[Cell]) -> None:
    """Replay the held-out answers with every head, and ask its gate; what is done is kept.

    Raises:
        ViSpecError: the target, a head or the data cannot be used.
    """
    missing = [cell for cell in cells if not replayed_file(workspace, cell).is_file()]
    if not missing:
        return

    model, observed = observe(target, workspace.held_out)
    states = list(question_states(observed))
    for cell in missing:
        folder = workspace.head(cell)
        draft = load_draft(folder).eval()
        spec = draft.config.compressor_spec
        if draft.config.has_compressor and spec.gated:
            found = choose_by_family(load_compressor(folder), states)
            write_json(choices_file(workspace, cell), [asdict(one) for one in found])
        replayed = [asdict(one) for one in replay_all(draft, model, observed)]
        write_json(replayed_file(workspace, cell), replayed)
        print(f"replayed: {cell.name}", flush=True)


def observe(target: str, data: Path) -> tuple[TrainingTarget, list[Observed]]:
    """The target in float32 on the CPU, and what it computes for the conversations of a file."""
    import torch

    from vllm_vispec.data.encode import Encoder
    from vllm_vispec.data.template import load_processor
    from vllm_vispec.evaluate.options import DataSource
    from vllm_vispec.train.target import TrainingTarget

    source, model = DataSource(data), TrainingTarget.load(target, torch.float32, "cpu")
    encoder = Encoder(load_processor(target), MAX_LENGTH, source.images)
    groups = source.batches(encoder, BATCH_SIZE, [])
    return model, [
        one for group in groups for one in model.observe([sample.encoded for sample in group])
    ]


def replay_all(
    draft: ViSpecDraft, target: TrainingTarget, observed: Sequence[Observed]
) -> list[Replayed]:
    """Accepted drafts of greedy chains over the answers of conversations."""
    import torch

    from vllm_vispec.train.batch import pad_batch
    from vllm_vispec.train.simulate import answer_spans, draft_hits, replay

    found = []
    for start in range(0, len(observed), BATCH_SIZE):
        group = observed[start : start + BATCH_SIZE]
        with torch.inference_mode():
            hits_SBL = draft_hits(draft, target.lm_head_VD, pad_batch(group), NUM_DRAFT_TOKENS)
        for number, one in enumerate(group):
            hits = hits_SBL[:, number].tolist()
            spans = answer_spans(one.answer.tolist())
            accepted = [count for begin, end in spans for count in replay(hits, begin, end)]
            found.append(Replayed(one.family, tuple(accepted)))
    return found
