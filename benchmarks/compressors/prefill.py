"""What the draft's first pass over a prompt costs, by image tokens, beside EagleVLM's.

Two engines with the same target take turns: the head, and the reference head, which sees every
image token. Timed is the draft's part of a prefill: the compressor, the rows and the pass up to
the first draft token's logits.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.compressors.findings import IMAGE_TOKENS
from benchmarks.compressors.findings import PREFILL as PREFILLS
from benchmarks.study import Trained, Workspace
from examples.tiny_vlm.questions import write_questions
from vllm_vispec.bench.datasets import DatasetOptions, load_dataset
from vllm_vispec.bench.machine import has_gpu
from vllm_vispec.bench.profile import Engine, Group, groups_of
from vllm_vispec.bench.profile_engine import EngineProcess, Job, default_runner
from vllm_vispec.bench.profile_steps import PREFILL, Steps
from vllm_vispec.bench.questions import samples_for, tokens_of_target
from vllm_vispec.utils.files import write_json

QUESTIONS, REPETITIONS, MAX_TOKENS, NUM_DRAFT_TOKENS = 1, 6, 3, 1
FAMILY, START = "captioning", 120_000
# Room for 1,024 image tokens, which the tiny target's processor forbids by default.
PIXELS = {"min_pixels": 784, "max_pixels": 802_816}
SERVE_ARGS = (
    "--dtype=float32",
    "--max-model-len=2048",
    "--max-num-batched-tokens=2048",
    "--max-num-seqs=2",
    f"--mm-processor-kwargs={json.dumps(PIXELS)}",
)


@dataclass(frozen=True)
class Prefill:
    """Medians of the draft's seconds in prefills over one image of so many tokens.

    Attributes:
        ratio: median of the head's over the reference's in the same repetition.
        low, high: quartiles of these ratios.
    """

    image_tokens: int
    seconds: float
    reference_seconds: float
    ratio: float
    low: float
    high: float


def measure_prefill(
    workspace: Workspace, target: str, reference: Trained, heads: Iterable[Trained]
) -> None:
    """Measure every head that has no result yet, the reference beside itself too.

    Raises:
        ViSpecError: an engine fails.
    """
    missing = [one for one in heads if not workspace.result(PREFILLS, one).is_file()]
    if not missing:
        return
    logs = workspace.root / "logs"
    with tempfile.TemporaryDirectory(prefix="prefill-") as scratch:
        groups = _groups(target, Path(scratch))
        job = _job(target, str(workspace.head(reference)))
        with EngineProcess(reference.name, job, logs / "prefill-reference.log") as other:
            for cell in missing:
                job = _job(target, str(workspace.head(cell)))
                with EngineProcess(cell.name, job, logs / f"prefill-{cell.name}.log") as engine:
                    found = take_turns(engine, other, groups)
                write_json(workspace.result(PREFILLS, cell), [asdict(one) for one in found])


def take_turns(engine: Engine, reference: Engine, groups: Sequence[Group]) -> list[Prefill]:
    """Time both on all groups, once to warm up and then in turns."""
    for group in groups:
        engine.record(group)
        reference.record(group)
    pairs: dict[int, list[tuple[float, float]]] = {}
    for repetition in range(REPETITIONS):
        for group in groups:
            # Whoever comes second may find warmer caches.
            order = (engine, reference) if repetition % 2 else (reference, engine)
            seconds = {id(one): _draft_seconds(one.record(group)) for one in order}
            size, mine = seconds[id(engine)]
            pairs.setdefault(size, []).append((mine, seconds[id(reference)][1]))
    return [_summary(size, found) for size, found in sorted(pairs.items())]


def _draft_seconds(found: Steps) -> tuple[int, float]:
    """Image tokens, and seconds of the draft in the prefill."""
    (prefill,) = [one for one in found.steps if one.kind == PREFILL]
    return prefill.image_tokens, prefill.wholes["first_pass"]


def _summary(size: int, pairs: Sequence[tuple[float, float]]) -> Prefill:
    ratios = sorted(mine / other for mine, other in pairs)
    quarter = len(ratios) // 4
    return Prefill(
        size,
        median(mine for mine, _ in pairs),
        median(other for _, other in pairs),
        median(ratios),
        ratios[quarter],
        ratios[-1 - quarter],
    )


def _groups(target: str, folder: Path) -> list[Group]:
    write_questions(folder, "heldout", START, QUESTIONS, (FAMILY,))
    samples = load_dataset("tiny", folder, DatasetOptions(max_tokens=MAX_TOKENS)).samples
    tokens_of = tokens_of_target(target, SERVE_ARGS)
    sized = [samples_for(samples, size, tokens_of, folder / "sized") for size in IMAGE_TOKENS]
    return [group for found in sized for group in groups_of(found, 1)]


def _job(target: str, head: str) -> Job:
    draft = {"method": "vispec", "model": head, "num_speculative_tokens": NUM_DRAFT_TOKENS}
    # Other processes may be on the machine; waiting for them is not the draft's.
    clock = "wall" if has_gpu() else "cpu"
    return Job(target, SERVE_ARGS, draft, default_runner(), clock, concurrency=1)
