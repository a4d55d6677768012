"""Questions, and the target's answers to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.ablation.arms import Arm
from benchmarks.ablation.workspace import Workspace, run_vispec
from examples.tiny_vlm.families import FAMILIES
from examples.tiny_vlm.questions import TEXT_FAMILY, write_questions

MAX_TOKENS = 320
# Samples that the engine is asked about begin elsewhere: see benchmarks.ablation.measure.
HELD_OUT_START = 600_000
HELD_OUT = "held_out"


@dataclass(frozen=True)
class QuestionSet:
    """Samples of one split; `temperature` is how the target answers them."""

    name: str
    split: str
    start: int
    families: tuple[str, ...]
    temperature: float


SETS = (
    QuestionSet("mixed", "train", 30_000_000, tuple(FAMILIES), 1.0),
    QuestionSet("text", "train", 31_000_000, (TEXT_FAMILY,), 1.0),
    QuestionSet(HELD_OUT, "heldout", HELD_OUT_START, tuple(FAMILIES), 0.0),
)


def prepare(
    workspace: Workspace,
    target: str,
    samples: int,
    held_out: int,
    threads: int,
    arms: Iterable[Arm],
) -> None:
    """Write the question sets of arms and let the target answer; goes on where it stopped.

    Args:
        samples: of each training set.
        held_out: of the validation set.
    """
    wanted = {HELD_OUT, *(arm.data for arm in arms)}
    for chosen in [one for one in SETS if one.name in wanted]:
        folder = workspace.questions(chosen.name)
        count = held_out if chosen.split == "heldout" else samples
        if not (folder / "questions.jsonl").is_file():
            write_questions(folder, chosen.split, chosen.start, count, chosen.families)
        arguments = {
            "--target": target,
            "--input": str(folder / "questions.jsonl"),
            "--output": str(folder / "answers.jsonl"),
            "--prompt-style": "none",
            "--temperature": str(chosen.temperature),
            "--max-tokens": str(MAX_TOKENS),
            "--max-model-len": "1024",
            "--engine": '{"enforce_eager": true, "max_num_seqs": 64}',
        }
        flat = [part for item in arguments.items() for part in item]
        run_vispec(["regenerate", *flat], workspace.log(f"regenerate-{chosen.name}"), threads)
