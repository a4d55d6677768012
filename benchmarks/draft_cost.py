"""Cost of a ViSpec draft beside vLLM's own EAGLE: `python -m benchmarks draft-cost`.

`vispec bench profile` on held-out questions of the tiny world. Two engines with the same target
take turns, one with the ViSpec head, one with an EAGLE head of the same sizes that vLLM's own
proposer drives. Two numbers are printed apart, for decoding steps:

* first pass: from the call of the proposer to the logits of the first draft token.
* draft step: from the logits of one draft token to those of the next, mean of a step's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import FamilyOption, ThreadsOption
from benchmarks.report import RESULTS
from examples.pair import DraftOption, DraftTokensOption, ModelOption
from examples.tiny_vlm.families import FAMILIES
from examples.tiny_vlm.questions import write_questions
from examples.tiny_vlm.shipped import DRAFT_TOKENS, HEAD, MAX_MODEL_LEN, TARGET
from vllm_vispec.bench.datasets import DatasetOptions, load_dataset
from vllm_vispec.bench.pages import show
from vllm_vispec.bench.profile import ProfileSettings, run_profile
from vllm_vispec.bench.profile_result import to_page
from vllm_vispec.bench.profile_steps import Clock
from vllm_vispec.utils.files import write_json

FIRST_HELD_OUT = 100_000
MOST_ALLOWED = 1.10
SHOWN = ("first_pass", "draft_step")


def from_here(path: str) -> str:
    """Return a path below the current folder as others can use it, any other as it is."""
    here = Path.cwd()
    absolute = Path(path).absolute()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else path


def main(
    model: ModelOption = TARGET,
    draft_model: DraftOption = HEAD,
    num_speculative_tokens: DraftTokensOption = DRAFT_TOKENS,
    repetitions: Annotated[int, typer.Option(min=1)] = 3,
    per_family: Annotated[int, typer.Option(min=1, help="Dialogues per task family.")] = 1,
    family: FamilyOption = None,
    max_tokens: Annotated[int, typer.Option(min=2)] = 128,
    dtype: Annotated[str, typer.Option()] = "float32",
    threads: ThreadsOption = 1,
    clock: Annotated[Clock, typer.Option(help="wall, or cpu on a busy machine.")] = "wall",
    output: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "draft_cost.json",
    folder: Annotated[Path, typer.Option(help="For page, picture and logs.")] = Path(
        "out/draft_cost"
    ),
) -> None:
    """Compare the cost of a draft pass and of a draft step."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    families, data = tuple(family or FAMILIES), folder / "data"
    settings = ProfileSettings(
        target=from_here(model),
        head=from_here(draft_model),
        data=str(data),
        dataset="tiny",
        num_speculative_tokens=num_speculative_tokens,
        repetitions=repetitions,
        max_tokens=max_tokens,
        families=tuple(family or ()),
        clock=clock,
        serve_args=(
            f"--dtype={dtype}",
            f"--max-model-len={MAX_MODEL_LEN}",
            "--max-num-seqs=4",
            f"--max-num-batched-tokens={MAX_MODEL_LEN}",
        ),
    )
    write_questions(data, "heldout", FIRST_HELD_OUT, per_family * len(families), families)
    loaded = load_dataset("tiny", data, DatasetOptions(max_tokens=max_tokens))
    profile = run_profile(settings, loaded.samples, folder)
    show(to_page(profile))
    wholes = profile["decode"]["wholes"]
    for name in SHOWN:
        if name in wholes:
            found = wholes[name]
            print(
                f"{name} ratio: {found['ratio']:.3f}, of first deciles "
                f"{found['ratio_first_decile']:.3f} (at most {MOST_ALLOWED:.2f})"
            )
    write_json(output, profile)
    print(f"written: {output}")


if __name__ == "__main__":
    typer.run(main)
