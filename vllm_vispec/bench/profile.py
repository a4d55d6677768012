"""`vispec bench profile`: where a step's time goes, vLLM's own EAGLE beside ViSpec."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt

from vllm_vispec.bench.heads import plain_eagle_head, write_eagle_head
from vllm_vispec.bench.machine import describe_machine, has_gpu
from vllm_vispec.bench.matrix import AS_THEY_ARE, MAX_DRAFT_TOKENS, ImageTokens, ServeArgs
from vllm_vispec.bench.profile_engine import EngineProcess, Job, default_runner
from vllm_vispec.bench.profile_steps import (
    DECODE,
    EAGLE,
    KINDS,
    PREFILL,
    SIDES,
    VISPEC,
    Block,
    Clock,
    Steps,
)
from vllm_vispec.bench.schema import IMAGES_AS_THEY_ARE, BenchSample
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import write_json, write_text
from vllm_vispec.utils.process import interruptible
from vllm_vispec.utils.settings import CommandSettings, CommaSeparated

if TYPE_CHECKING:
    from vllm_vispec.bench.questions import AskTarget

_REMEDIES = {
    DECODE: "raise --max-tokens, lower --concurrency, and leave graphs off (--enforce-eager)",
    PREFILL: "let a prompt fit into one step with --serve '--max-num-batched-tokens ...'",
}

Group = Sequence[BenchSample]


class ProfileSettings(CommandSettings):
    """What is profiled, and how."""

    target: str = Field(description="Target: a folder or hub id.")
    head: str = Field(description="Draft: a head or a published model, folder or hub id.")
    data: str = Field(description="The dataset's file or folder.")
    dataset: str = Field(
        default="openai", description="How to read --data: mmspec, vispec, openai or tiny."
    )
    eagle_head: str | None = Field(
        default=None, description="Head for vLLM's EAGLE; default: one of --head's sizes."
    )
    num_speculative_tokens: int = Field(
        default=4,
        ge=1,
        le=MAX_DRAFT_TOKENS,
        description="K.",
        json_schema_extra={"flags": ["--num-speculative-tokens", "-k"]},
    )
    runner: Literal["v1", "v2"] = Field(
        default_factory=default_runner,
        description="vLLM's model runner; default: v2 on a GPU, else v1.",
    )
    concurrency: PositiveInt = Field(
        default=1,
        description="Requests that are asked together. Only decoding steps of so many count.",
    )
    repetitions: PositiveInt = Field(default=3, description="Of every question, besides a warm-up.")
    limit: PositiveInt | None = Field(default=None, description="Most samples; default: all.")
    max_tokens: PositiveInt | None = Field(
        default=None, description="Longest answer; default: the dataset's."
    )
    families: Annotated[tuple[str, ...], CommaSeparated] = Field(
        default=(), description="Only these task families, separated by commas; default: all."
    )
    image_tokens: ImageTokens = Field(
        default=(IMAGES_AS_THEY_ARE,),
        min_length=1,
        description="Image tokens of a request, e.g. native,0,256; 0 sends no image.",
        json_schema_extra={"default": AS_THEY_ARE},
    )
    clock: Clock = Field(
        default="wall", description="wall, or cpu on a busy machine without a GPU."
    )
    serve_args: ServeArgs = Field(
        default=(),
        description="vLLM's options for both engines, one string.",
        json_schema_extra={"flags": ["--serve"]},
    )
    speculative_config: dict[str, Any] = Field(
        default={}, description="More for ViSpec's draft, e.g. '{\"draft_vocab\": 4096}'."
    )


def run_profile(
    settings: ProfileSettings,
    samples: Sequence[BenchSample],
    output: Path,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure, and write `profile.json`, `profile.md`, `profile.svg` and `profile.png`.

    Returns what `profile.json` has: the conditions; for each kind of step what `summarise` returns;
    prefills again by image tokens; and how many steps are in neither, by side and reason.

    Engines are gone when this returns, also after SIGINT and SIGTERM. Files of an earlier profile
    in the folder are replaced.

    Raises:
        ViSpecError: a head cannot be used, an engine fails, no step can be compared, or the
            folder cannot be written.
        KeyboardInterrupt: on SIGINT and SIGTERM.
    """
    from vllm_vispec.bench.profile_result import by_image_tokens, draw, summarise, to_page

    if settings.clock == "cpu" and has_gpu():
        raise ViSpecError("--clock cpu does not see what a GPU does: use --clock wall")
    machine = describe_machine()
    with ExitStack() as stack:
        stack.enter_context(interruptible())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vispec-profile-")))
        engines = {}
        # One after the other: each measures the memory that is free.
        for side, job in jobs(settings, folder).items():
            log(f"starting {side}")
            engine = EngineProcess(side, job, output / "logs" / f"{side}.log")
            engines[side] = stack.enter_context(engine)
        groups = groups_for(settings, samples, folder / "images", engines[VISPEC].answer)
        blocks, left_out = measure(engines, groups, settings.repetitions, log)
    kinds = {
        kind: [[pair for pair in block if pair[0].kind == kind] for block in blocks]
        for kind in KINDS
    }
    profile = {
        "machine": machine,
        "settings": settings.model_dump(mode="json"),
        "command": typed_command(),
        "left_out": left_out,
        **{kind: summarise(found) for kind, found in kinds.items()},
        "prefill_by_image_tokens": by_image_tokens(kinds[PREFILL]),
    }
    write_json(output / "profile.json", profile)
    write_text(output / "profile.md", to_page(profile))
    draw(profile, output)
    return profile


def typed_command() -> str:
    """Return the command line of this process, without the path of its program."""
    program = Path(sys.argv[0])
    words = [program.name]
    if program.name == "__main__.py":
        words = ["python", "-m", program.parent.name]
    return shlex.join([*words, *sys.argv[1:]])


def jobs(settings: ProfileSettings, folder: Path) -> dict[str, Job]:
    """Return what to start, by side.

    Args:
        folder: for a head that is made.

    Raises:
        ViSpecError: a draft cannot be used.
    """
    from vllm_vispec.bench.server import GPU_SHARE
    from vllm_vispec.draft_model.named import check_draft

    serve_args = settings.serve_args
    if has_gpu():
        # In front: what the user gives wins.
        serve_args = (f"--gpu-memory-utilization={GPU_SHARE / len(SIDES):.3f}", *serve_args)
    check_draft(settings.head, settings.target)
    given = settings.eagle_head
    eagle_head = (
        write_eagle_head(settings.head, settings.target, folder / EAGLE)
        if given is None
        else plain_eagle_head(given, settings.target, folder / EAGLE)
    )
    fixed = {"adaptive": False, **settings.speculative_config}
    drafts = {
        EAGLE: {"method": "eagle", "model": eagle_head},
        VISPEC: fixed | {"method": "vispec", "model": settings.head},
    }
    k = {"num_speculative_tokens": settings.num_speculative_tokens}
    return {
        side: Job(
            target=settings.target,
            serve_args=serve_args,
            speculative_config=draft | k,
            runner=settings.runner,
            clock=settings.clock,
            concurrency=settings.concurrency,
        )
        for side, draft in drafts.items()
    }


def groups_for(
    settings: ProfileSettings, samples: Sequence[BenchSample], folder: Path, ask: AskTarget
) -> list[Group]:
    """Return what is asked together, for every number of image tokens.

    The last group of a number is filled from the front.

    Args:
        folder: gets resized images.
        ask: gives the target's own answers where a dialogue needs them.

    Raises:
        ViSpecError: images cannot have so many tokens, or there are too few samples.
    """
    from vllm_vispec.bench.questions import samples_for, tokens_of_target, with_answers

    tokens_of = cache(lambda: tokens_of_target(settings.target, settings.serve_args))
    size = settings.concurrency
    groups: list[Group] = []
    for tokens in settings.image_tokens:
        sized = samples_for(samples, tokens, lambda side: tokens_of()(side), folder)
        if size > len(sized):
            raise ViSpecError(
                f"--concurrency {size}: the dataset has {len(sized)} samples; give more, or ask "
                "for less"
            )
        ready = with_answers(sized, ask)
        twice = [*ready, *ready]
        groups += [twice[start : start + size] for start in range(0, len(ready), size)]
    return groups


def measure(
    engines: Mapping[str, EngineProcess],
    groups: Sequence[Group],
    repetitions: int,
    log: Callable[[str], None] = print,
) -> tuple[list[Block], dict[str, dict[str, int]]]:
    """Let both sides answer every group in turns; the first time is to warm up.

    Who goes first alternates from group to group and from repetition to repetition. Returns the
    blocks, and how many steps are in none of them, by side and reason.

    Raises:
        ViSpecError: an engine fails, or no step of a kind is complete.
    """
    for group in groups:
        for side in SIDES:
            engines[side].record(group)
    left_out: dict[str, Counter[str]] = {side: Counter() for side in SIDES}
    blocks = []
    for repetition in range(repetitions):
        for number, group in enumerate(groups):
            order = SIDES if (repetition + number) % 2 == 0 else SIDES[::-1]
            found = {side: engines[side].record(group) for side in order}
            block = pair(found[EAGLE], found[VISPEC])
            blocks.append(block)
            for side in SIDES:
                alone = len(found[side].steps) - len(block)
                left_out[side] += Counter(found[side].left_out) + Counter(
                    {"without a counterpart": alone}
                )
        log(f"  repetition {repetition + 1} of {repetitions} done")
    counts = {side: dict(left_out[side]) for side in SIDES}
    there = {eagle.kind for block in blocks for eagle, _ in block}
    for kind, remedy in _REMEDIES.items():
        if kind not in there:
            raise ViSpecError(f"no {kind} step could be compared (left out: {counts}): {remedy}")
    return blocks, counts


def pair(eagle: Steps, vispec: Steps) -> Block:
    """Keep, of every kind of step, as many as both sides have.

    Prefills are counterparts if they are over the same batch. One side may need fewer decoding
    steps; its last ones are over a longer context, so the rest of the other side's are left out.
    """
    block: Block = []
    for kind in KINDS:
        sides = [[one for one in side.steps if one.kind == kind] for side in (eagle, vispec)]
        both = zip(*sides, strict=False)
        block += takewhile(lambda two: two[0].shape == two[1].shape, both)
    return block
