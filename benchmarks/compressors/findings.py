"""Everything that is known about one measured head, and its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from benchmarks.ablation.arms import EPOCHS, Arm, Cell
from benchmarks.ablation.intervals import Estimate, estimate, ratio, tokens_per_round
from benchmarks.ablation.results import IMAGES, Row, make_rows, read_all
from benchmarks.ablation.workspace import Workspace
from benchmarks.compressors.arms import ARMS
from benchmarks.compressors.choices import Choices, choices_file, read_choices
from benchmarks.compressors.cost import IMAGE_TOKENS, ImageCost, image_cost
from benchmarks.compressors.held_out import Replayed, read_replayed, replayed_file
from benchmarks.compressors.prefill import Prefill, prefill_file, read_prefill
from examples.tiny_vlm.questions import IMAGE_FAMILIES
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.folder import inspect_head
from vllm_vispec.reference import tensor_shapes


@dataclass(frozen=True)
class Finding:
    """One arm after some epochs.

    Attributes:
        cell: its head with the first seed, which everything but `row` is about.
        row: acceptance and speed in the engine; None where it was not asked.
        replayed: tokens_per_round on the held-out image tasks by replay; None if not computed.
        replayed_gain: how many times more that is than the reference's after as many epochs.
        parameters: of the head, and those of the compressor, the adaptor and the gate.
        costs, prefill: by image tokens; `prefill` is empty where it was not measured.
        choices: of the gate by task family; empty without a gate.
    """

    cell: Cell
    row: Row | None
    replayed: Estimate | None
    replayed_gain: Estimate | None
    parameters: tuple[int, int]
    costs: dict[int, ImageCost]
    prefill: dict[int, Prefill]
    choices: tuple[Choices, ...]

    @property
    def arm(self) -> Arm:
        """What was trained."""
        return self.cell.arm

    @property
    def tokens_per_round(self) -> Estimate | None:
        """On the image tasks: by replay, which is over more questions, or else in the engine."""
        if self.replayed is None and self.row is not None:
            return self.row.tokens_per_round[IMAGES]
        return self.replayed

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.cell.name,
            "label": self.arm.label,
            "settings": dict(self.arm.settings),
            "epochs": self.cell.epochs,
            "engine": self.row and self.row.to_json(),
            "replayed": self.replayed and asdict(self.replayed),
            "replayed_ratio": self.replayed_gain and asdict(self.replayed_gain),
            "parameters": self.parameters[0],
            "parameters_for_images": self.parameters[1],
            "image_cost": [one.to_json() for one in self.costs.values()],
            "draft_prefill": [asdict(one) for one in self.prefill.values()],
            "choices": [asdict(one) for one in self.choices],
        }


def read_findings(
    workspace: Workspace, arms: Sequence[Arm], seeds: tuple[int, ...]
) -> list[Finding]:
    """All heads that were measured in some way."""
    rows = {row.name: row for row in make_rows(read_all(workspace, arms, seeds), arms, seeds)}
    found = [
        _finding(workspace, Cell(arm, epochs, seeds[0]), rows.get(f"{arm.name}-e{epochs}"))
        for arm in arms
        for epochs in arm.epochs
        if workspace.head(Cell(arm, epochs, seeds[0])).is_dir()
    ]
    return [one for one in found if one.row or one.replayed]


def _finding(workspace: Workspace, cell: Cell, row: Row | None) -> Finding:
    config = inspect_head(workspace.head(cell)).config
    prefill, choices = prefill_file(workspace, cell), choices_file(workspace, cell)
    mine = _replayed(workspace, cell)
    reference = _replayed(workspace, replace(cell, arm=ARMS[cell.arm.after or cell.arm.name]))
    compared = mine and reference and cell.arm.after
    return Finding(
        cell,
        row,
        estimate([mine], tokens_per_round) if mine else None,
        ratio([mine], [reference], tokens_per_round) if compared else None,
        count_parameters(config),
        {size: image_cost(config, size) for size in IMAGE_TOKENS},
        read_prefill(prefill) if prefill.is_file() else {},
        tuple(read_choices(choices)) if choices.is_file() else (),
    )


def _replayed(workspace: Workspace, cell: Cell) -> list[Replayed]:
    """Of the image tasks; nothing if it was not computed."""
    file = replayed_file(workspace, cell)
    found = read_replayed(file) if file.is_file() else []
    return [one for one in found if one.family in IMAGE_FAMILIES]


def count_parameters(config: HeadConfig) -> tuple[int, int]:
    """Weights of a head without its embedding table, and those that only images need."""
    counts = {name: prod(shape) for name, shape in tensor_shapes(config).items()}
    counts.pop("embed_tokens.weight", None)
    of_images = ("compressor.", "img_adaptor.", "img_fc.")
    return sum(counts.values()), sum(n for name, n in counts.items() if name.startswith(of_images))


def at_main_epoch(findings: Sequence[Finding]) -> list[Finding]:
    """Those after as many epochs as all arms were trained for."""
    return [one for one in findings if one.cell.epochs == EPOCHS]
