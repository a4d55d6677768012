"""From settings and samples to the files of a profile."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vllm_vispec.bench.follow_up import Ask, with_answers
from vllm_vispec.bench.heads import plain_eagle_head
from vllm_vispec.bench.images import samples_for, tokens_of_target
from vllm_vispec.bench.machine import describe_machine, has_gpu
from vllm_vispec.bench.profile.eagle_head import write_eagle_head
from vllm_vispec.bench.profile.engines import EngineProcess
from vllm_vispec.bench.profile.measure import Group, Measured, Say, groups_of, measure
from vllm_vispec.bench.profile.picture import draw
from vllm_vispec.bench.profile.result import Profile, make_profile
from vllm_vispec.bench.profile.settings import EAGLE, SIDES, VISPEC, ProfileSettings
from vllm_vispec.bench.profile.tables import to_page
from vllm_vispec.bench.profile.worker import Job
from vllm_vispec.bench.runner import interruptible
from vllm_vispec.bench.schema import BenchSample
from vllm_vispec.bench.server import option_value
from vllm_vispec.bench.serving import GPU_SHARE
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import write_json, write_text

JSON, PAGE, PICTURE = "profile.json", "profile.md", "profile.svg"
METHODS = {EAGLE: "eagle", VISPEC: "vispec"}

MakeEngine = Callable[[str, Job, Path], EngineProcess]


@dataclass(frozen=True)
class Tools:
    """What a profile uses of the world outside; tests put stand-ins here."""

    make_engine: MakeEngine = EngineProcess
    machine: Callable[[], dict[str, Any]] = describe_machine
    say: Say = print


def run_profile(
    settings: ProfileSettings,
    samples: Sequence[BenchSample],
    output: Path,
    tools: Tools | None = None,
) -> Profile:
    """Measure, and write `profile.json`, `profile.md`, `profile.svg` and `profile.png`.

    Engines are gone when this returns, also after SIGINT and SIGTERM. Files of an earlier profile
    in the folder are replaced.

    Raises:
        ViSpecError: a head cannot be used, an engine fails, no round can be compared, or the
            folder cannot be written.
        KeyboardInterrupt: on SIGINT and SIGTERM.
    """
    tools = tools or Tools()
    _check_clock(settings)
    machine = tools.machine()
    with interruptible(), tempfile.TemporaryDirectory(prefix="vispec-profile-") as scratch:
        measured = _measure(settings, samples, Path(scratch), output / "logs", tools)
    profile = make_profile(settings, measured, machine, settings.command(output))
    write_json(output / JSON, profile.to_json())
    write_text(output / PAGE, to_page(profile, PICTURE))
    draw(profile, output)
    return profile


def jobs(settings: ProfileSettings, folder: Path) -> dict[str, Job]:
    """Return what to start, by side.

    Args:
        folder: for a head that is made.

    Raises:
        ViSpecError: a head cannot be used.
    """
    given = settings.eagle_head
    heads = {
        VISPEC: settings.head,
        EAGLE: write_eagle_head(settings.head, folder / EAGLE)
        if given is None
        else plain_eagle_head(given, settings.target, folder / EAGLE),
    }
    return {
        side: Job(
            target=settings.target,
            serve_args=_serve_args(settings),
            speculative_config={
                **(settings.draft_settings if side == VISPEC else {}),
                "method": METHODS[side],
                "model": heads[side],
                "num_speculative_tokens": settings.num_speculative_tokens,
            },
            runner=settings.runner,
            clock=settings.clock,
            concurrency=settings.concurrency,
        )
        for side in SIDES
    }


def groups_for(
    settings: ProfileSettings, samples: Sequence[BenchSample], folder: Path, ask: Ask
) -> list[Group]:
    """Return what is asked together, for every number of image tokens.

    Args:
        folder: gets resized images.
        ask: gives the target's own answers where a dialogue needs them.

    Raises:
        ViSpecError: images cannot have so many tokens, or there are too few samples.
    """
    counter = cache(lambda: _tokens_of(settings))
    found = []
    for tokens in settings.image_tokens:
        sized = samples_for(samples, tokens, lambda side: counter()(side), folder)
        found += groups_of(with_answers(sized, ask), settings.concurrency)
    return found


def _measure(
    settings: ProfileSettings,
    samples: Sequence[BenchSample],
    folder: Path,
    logs: Path,
    tools: Tools,
) -> Measured:
    with _engines(jobs(settings, folder), logs, tools) as engines:
        groups = groups_for(settings, samples, folder / "images", engines[VISPEC].answer)
        return measure(engines, groups, settings.repetitions, tools.say)


@contextmanager
def _engines(
    wanted: Mapping[str, Job], logs: Path, tools: Tools
) -> Iterator[dict[str, EngineProcess]]:
    """Both engines, started one after the other: each measures the memory that is free."""
    with ExitStack() as stack:
        found = {}
        for side, job in wanted.items():
            tools.say(f"starting {side}")
            engine = tools.make_engine(side, job, logs / f"{side}.log")
            found[side] = stack.enter_context(engine)
        yield found


def _serve_args(settings: ProfileSettings) -> tuple[str, ...]:
    given = settings.serve_args
    if has_gpu() and option_value(given, "--gpu-memory-utilization") is None:
        return (f"--gpu-memory-utilization={GPU_SHARE / len(SIDES):.3f}", *given)
    return given


def _tokens_of(settings: ProfileSettings) -> Callable[[int], int]:
    text = option_value(settings.serve_args, "--mm-processor-kwargs") or "{}"
    try:
        return tokens_of_target(settings.target, dict(json.loads(text)))
    except ValueError as error:
        raise ViSpecError(f"--mm-processor-kwargs {text} is no JSON object ({error})") from error


def _check_clock(settings: ProfileSettings) -> None:
    if settings.clock == "cpu" and has_gpu():
        raise ViSpecError("--clock cpu does not see what a GPU does: use --clock wall")
