"""What the gates of trained heads choose on held-out questions, by task family."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.ablation.arms import Cell
from benchmarks.ablation.workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_vispec.compressors.compressor import ImageCompressor
    from vllm_vispec.train.batch import Observed


@dataclass(frozen=True)
class Choices:
    """A gate on the questions of one family.

    Attributes:
        branches: texts of the branches.
        counts: how often each has the largest share.
        shares: mean share of each.
    """

    family: str
    branches: tuple[str, ...]
    counts: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Choices:
        """Read what `asdict` and JSON made of one."""
        lists = {name: tuple(value) for name, value in fields.items() if name != "family"}
        return cls(family=fields["family"], **lists)


def choices_file(workspace: Workspace, cell: Cell) -> Path:
    """What was found for a head."""
    return workspace.root / "choices" / f"{cell.name}.json"


def read_choices(file: Path) -> list[Choices]:
    """What was written of a head."""
    return [Choices.from_json(fields) for fields in json.loads(file.read_text())]


def question_states(observed: Iterable[Observed]) -> Iterator[tuple[str, Tensor]]:
    """Family and target state [D] at the end of the prompt, of every answer behind an image."""
    from vllm_vispec.train.simulate import answer_spans

    for one in observed:
        first_image = min((start for start, _ in one.runs), default=len(one.token_ids))
        for start, _ in answer_spans(one.answer.tolist()):
            if first_image < start:
                yield one.family, one.hidden_LD[start - 1]


def load_compressor(head: Path) -> ImageCompressor:
    """The compressor of a trained head, float32."""
    from vllm_vispec.compressors.compressor import ImageCompressor
    from vllm_vispec.heads.folder import inspect_head, iter_canonical_tensors

    config = inspect_head(head).config
    compressor = ImageCompressor(
        config.compressor_spec, config.hidden_size, config.num_attention_heads, config.qkv_bias
    )
    prefix = "compressor."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in iter_canonical_tensors(head)
        if name.startswith(prefix)
    }
    compressor.load_state_dict(tensors)
    return compressor.float()


def choose_by_family(
    compressor: ImageCompressor, asked: Sequence[tuple[str, Tensor]]
) -> list[Choices]:
    """Choices of a gate, families in the order in which they come."""
    import torch

    families = list(dict.fromkeys(family for family, _ in asked))
    branches = tuple(map(str, compressor.spec.primitives))
    found = []
    for family in families:
        states_GD = torch.stack([state for name, state in asked if name == family])
        with torch.inference_mode():
            output = compressor.decide(states_GD)
        counts = torch.bincount(output.choice_G, minlength=len(branches))
        shares = output.share_GK.mean(0)
        found.append(Choices(family, branches, tuple(counts.tolist()), tuple(shares.tolist())))
    return found


def in_all(found: Sequence[Choices]) -> Choices:
    """All families together; at least one."""
    weights = [sum(one.counts) for one in found]
    total = sum(weights)
    by_branch = list(zip(*(one.shares for one in found), strict=True))
    shares = (
        sum(w * share for w, share in zip(weights, column, strict=True)) / total
        for column in by_branch
    )
    counts = (sum(column) for column in zip(*(one.counts for one in found), strict=True))
    return Choices("all", found[0].branches, tuple(counts), tuple(shares))
