"""Studies of heads: variants x seeds -> heads -> answers -> JSON -> tables and picture.

Every step goes on after a stop. A study is a registry of variants and a report; see
`benchmarks.ablation` and `benchmarks.compressors`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import typer

from benchmarks import ThreadsOption
from benchmarks.report import PAGES, RESULTS, publish
from examples.pair import ModelOption
from examples.tiny_vlm.canvas import SIDE
from examples.tiny_vlm.families import FAMILIES
from examples.tiny_vlm.questions import TEXT_FAMILY, write_questions
from examples.tiny_vlm.shipped import MAX_MODEL_LEN, TARGET
from vllm_vispec.bench.machine import server_environment
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import writing

EPOCHS = 2  # of nearly all variants, on as many samples
NUM_DRAFT_TOKENS = 5
RECIPE = "examples/recipes/tiny.yaml"
MAX_TOKENS, LOG_TAIL = 320, 3000
HELD_OUT = "held_out"
# Name, split, first sample, families, temperature at which the target answers. The engine is asked
# about other held-out samples, see `benchmarks.turns`.
QuestionSet = tuple[str, str, int, tuple[str, ...], float]
QUESTION_SETS: tuple[QuestionSet, ...] = (
    ("mixed", "train", 30_000_000, tuple(FAMILIES), 1.0),
    ("text", "train", 31_000_000, (TEXT_FAMILY,), 1.0),
    (HELD_OUT, "heldout", 600_000, tuple(FAMILIES), 0.0),
)
# What all variants share and the recipe has otherwise: a fixed number of steps, one pass.
BASE: Mapping[str, str] = {
    "loss.name": "kl",
    "loss.weights": "{feature: 0.5}",
    "loss.passes": "1",
    "loss.pass_decay": "1.0",
    "schedule.minutes": "0",
    "data.max_length": str(MAX_MODEL_LEN),
    # Some answers are the world's own, which do not say what images they were made with.
    "data.min_pixels": str(SIDE**2),
    "data.max_pixels": str(SIDE**2),
    "run.validate_every": "0",
    "run.save_every": "0",
    "run.export": "last",
    "head.dtype": "float32",
}
# SpecVLM (arXiv 2509.11815): its loss on the target's logits, and a constant rate, so that one run
# goes through all epochs. The target's states come from the cache: the same numbers as with the
# target in every step (tests/train/test_loop.py), in a fifth of the time.
ONLINE = MappingProxyType(
    {"loss.name": "specvlm", "loss.weights": "{}", "schedule.decay": "constant"}
)


@dataclass(frozen=True)
class Variant:
    """One way to make a head.

    Attributes:
        name: Of its folders and in the JSON.
        label: In tables and plots.
        kind: Of the head, as in the recipe.
        more: Other changes to the base recipe.
        data: Which questions, "mixed" (all task families) or "text" (no images).
        answers: "short" (the question set's own) or "target" (written by the target, sampled).
        epochs: A head is measured after each of these.
        after: The variant that it changes in one thing; "" for a start of its own.
    """

    name: str
    label: str
    kind: str
    more: Mapping[str, str] = field(default_factory=dict)
    data: str = "mixed"
    answers: str = "target"
    epochs: tuple[int, ...] = (EPOCHS,)
    after: str = ""

    @property
    def settings(self) -> dict[str, str]:
        """All changes to the base recipe."""
        return {"head.kind": self.kind, **self.more}


@dataclass(frozen=True)
class Trained:
    """One head: a variant after some epochs, with one seed."""

    variant: Variant
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.variant.name}-e{self.epochs}-s{self.seed}"


class Step(StrEnum):
    """Parts of the run, in their order."""

    PREPARE = "prepare"
    TRAIN = "train"
    MEASURE = "measure"
    REPORT = "report"


@dataclass(frozen=True)
class Study:
    """What is trained and measured, and where.

    Attributes:
        root: Folder of data, runs and results so far.
        target: Folder or hub id.
        samples, held_out: Of each training set, and of the validation set.
        per_family: Held-out questions of each family that the engine answers.
        threads: Of every process.
    """

    root: Path
    target: str
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    samples: int
    held_out: int
    per_family: int
    threads: int = 1

    # What a study of another pair has otherwise; `limits`: tokens of an answer, and with a prompt.
    base_recipe: ClassVar[str] = RECIPE
    base: ClassVar[Mapping[str, str]] = BASE
    question_sets: ClassVar[Sequence[QuestionSet]] = QUESTION_SETS
    limits: ClassVar[tuple[int, int]] = (MAX_TOKENS, MAX_MODEL_LEN)

    def questions(self, data: str) -> Path:
        """Folder of a question set: questions.jsonl, images/ and answers.jsonl."""
        return self.root / "data" / data

    def cache(self, variant: Variant) -> Path:
        """Hidden states of a variant's samples, shared by all variants with the same ones."""
        return self.root / "cache" / f"{variant.data}-{variant.answers}"

    def head(self, trained: Trained) -> Path:
        """Folder of a finished head."""
        return self.root / "heads" / trained.name

    def result(self, kind: str, trained: Trained) -> Path:
        """What was found about a head: "cells" (in the engine), "replayed", "choices"."""
        return self.root / kind / f"{trained.name}.json"

    @property
    def logs(self) -> Path:
        """Folder for the output of commands and engines."""
        return self.root / "logs"

    def heads(self, seeds: Iterable[int] | None = None) -> list[Trained]:
        """Every head, seed by seed."""
        return [
            Trained(variant, epochs, seed)
            for seed in (self.seeds if seeds is None else seeds)
            for variant in self.variants
            for epochs in variant.epochs
        ]

    def settings(self) -> dict[str, Any]:
        """What the JSON file says of the run."""
        return {
            "samples": self.samples,
            "epochs": EPOCHS,
            "recipe": self.base_recipe,
            "seeds": self.seeds,
            "num_speculative_tokens": NUM_DRAFT_TOKENS,
            "per_family": self.per_family,
            "threads": self.threads,
            "batch": 1,
            "temperature": 0,
        }

    def prepare(self) -> None:
        """Write the question sets, let the target answer, and keep the states it has there."""
        self.answer({HELD_OUT, *(variant.data for variant in self.variants)})
        # Before several runs need them at once. EAGLE reads those of images, too: it goes last.
        ordered = sorted(self.variants, key=lambda one: one.kind == "eagle_vlm")
        for variant in {self.cache(one): one for one in ordered}.values():
            settings = self.recipe(variant, 0) | {"teacher.mode": "offline"}
            settings["schedule.epochs"] = str(variant.epochs[-1])
            log = f"cache-{variant.data}-{variant.answers}"
            self._vispec(["train", self.base_recipe, "--cache-only", *_flags(settings)], log)

    def answer(self, wanted: Container[str]) -> None:
        """Write question sets and let the target answer them."""
        for name, split, start, families, temperature in self.question_sets:
            if name not in wanted:
                continue
            folder = self.questions(name)
            count = self.held_out if split == "heldout" else self.samples
            if not (folder / "questions.jsonl").is_file():
                self.write_questions(folder, split, start, count, families)
            arguments = {
                "--target": self.target,
                "--input": str(folder / "questions.jsonl"),
                "--output": str(folder / "answers.jsonl"),
                "--prompt-style": "none",
                "--temperature": str(temperature),
                "--max-tokens": str(self.limits[0]),
                "--max-model-len": str(self.limits[1]),
                "--engine": '{"enforce_eager": true, "max_num_seqs": 64}',
            }
            flat = [part for item in arguments.items() for part in item]
            self._vispec(["regenerate", *flat], f"regenerate-{name}")

    def write_questions(
        self, folder: Path, split: str, start: int, count: int, families: Sequence[str]
    ) -> None:
        """Write a question set: questions.jsonl and images/."""
        write_questions(folder, split, start, count, families)

    def train(self) -> None:
        """Train every variant with every seed."""
        for seed in self.seeds:
            for variant in self.variants:
                self._train_variant(variant, seed)
                print(f"trained: {variant.name}, seed {seed}", flush=True)

    def _train_variant(self, variant: Variant, seed: int) -> None:
        """A run goes on from one measured epoch to the next."""
        settings = self.recipe(variant, seed)
        trained = Path(settings["run.output"]) / "head"
        for before, epochs in pairwise((0, *variant.epochs)):
            head = self.head(Trained(variant, epochs, seed))
            if head.is_dir():
                continue
            override = ["--override", "schedule.epochs"] if before else []
            shutil.rmtree(trained, ignore_errors=True)  # of the epoch before
            flags = _flags(settings | {"schedule.epochs": str(epochs)})
            command = ["train", self.base_recipe, *flags, *override]
            self._vispec(command, f"train-{variant.name}-s{seed}")
            if not trained.is_dir():
                raise ViSpecError(
                    f"training of {head.name} was stopped: run the same command to go on"
                )
            with writing(head) as aside:
                shutil.copytree(trained, aside)

    def recipe(self, variant: Variant, seed: int) -> dict[str, str]:
        """Everything that differs from the recipe, the number of epochs apart."""
        file = {"short": "questions.jsonl", "target": "answers.jsonl"}[variant.answers]
        return {
            **self.base,
            "target.model": self.target,
            "data.train": str(self.questions(variant.data) / file),
            "data.validation": str(self.questions(HELD_OUT) / "answers.jsonl"),
            "teacher.cache_dir": str(self.cache(variant)),
            "run.output": str(self.root / "runs" / f"{variant.name}-s{seed}"),
            "run.seed": str(seed),
            **variant.settings,
        }

    def _vispec(self, arguments: Sequence[str], name: str) -> None:
        """Run a command of `vispec` in a process of its own.

        Raises:
            ViSpecError: it failed.
        """
        log = self.logs / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = server_environment()
        environment |= {"OMP_NUM_THREADS": str(self.threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        with log.open("a") as sink:
            command = [sys.executable, "-m", "vllm_vispec", *arguments]
            code = subprocess.run(command, stdout=sink, stderr=sink, env=environment).returncode
        if code:
            tail = log.read_text(errors="replace")[-LOG_TAIL:]
            raise ViSpecError(f"vispec {' '.join(arguments)} failed; the end of {log}:\n{tail}")


def _flags(settings: Mapping[str, str]) -> list[str]:
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


def by_name(*variants: Variant) -> Mapping[str, Variant]:
    """Return a registry of variants."""
    return MappingProxyType({variant.name: variant for variant in variants})


def choose(option: str, names: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """Return the names that an option gives, all known ones if it gives none.

    Raises:
        typer.BadParameter: a name is unknown.
    """
    every = list(known)
    for name in names or ():
        if name not in every:
            raise typer.BadParameter(f"{option} {name} is unknown: use {', '.join(every)}")
    return list(names or every)


def study_command(
    name: str,
    variants: Mapping[str, Variant],
    seeds: tuple[int, ...],
    measure: Callable[[Study], None],
    report: Callable[[Study], Mapping[str, Any]],
    tables: Callable[[Mapping[str, Any]], str],
    draw: Callable[[Mapping[str, Any], Path], None],
) -> Callable[..., None]:
    """Return the command of a study.

    Args:
        name: Of its folder below `out`, its JSON and its page.
        measure: Asks the engine and whoever else.
        report: Makes the JSON's content.
        tables, draw: See `benchmarks.report.publish`.
    """

    def main(
        model: ModelOption = TARGET,
        work_dir: Annotated[Path, typer.Option(help="Data, runs and results so far.")] = Path("out")
        / name,
        step: Annotated[list[Step] | None, typer.Option(help="Only these parts; repeat.")] = None,
        seed: Annotated[list[int] | None, typer.Option(help="Repeat. Default: all.")] = None,
        variant: Annotated[
            list[str] | None, typer.Option("--variant", "--arm", help="Repeat. Default: all.")
        ] = None,
        samples: Annotated[int, typer.Option(min=32, help="Of each training set.")] = 1680,
        held_out: Annotated[int, typer.Option(min=7, help="For the curves of the runs.")] = 112,
        per_family: Annotated[int, typer.Option(min=1, help="Questions to the engine.")] = 4,
        threads: ThreadsOption = 1,
        output: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / f"{name}.json",
        page: Annotated[Path, typer.Option(help="Page with the tables.")] = PAGES / f"{name}.md",
    ) -> None:
        """Train and measure every variant with every seed."""
        study = Study(
            work_dir.resolve(),
            model,
            tuple(variants[one] for one in choose("--variant", variant, variants)),
            tuple(seed or seeds),
            samples,
            held_out,
            per_family,
            threads,
        )
        steps = set(step or Step)
        if Step.PREPARE in steps:
            study.prepare()
        if Step.TRAIN in steps:
            study.train()
        if Step.MEASURE in steps:
            measure(study)
        if Step.REPORT in steps:
            publish(output, page, report(study), tables, draw)

    return main
