"""Drafts for a real language model, and what they gain from the image: `python -m benchmarks real`.

The target is that of `examples.real_vlm`. Every arm trains with `vispec train` on the same answers
that the target sampled itself, in the same order and in as many steps; text-only EAGLE's have no
images. Heads share input norm and loss, so that they differ in what they see of an image: a head
that is trained without an adaptor is then SpecVLM's `text_only`, one arm.

`--step prepare --step train` makes the data and the drafts, the other steps measure them. A stopped
run goes on. `--quick` measures one head that is there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
import yaml

from benchmarks import ThreadsOption, real_replay, report
from benchmarks.calls import shown
from benchmarks.pair_report import THREADS
from benchmarks.real_replay import ALL, CLASSES, DRAFT_TOKENS, LOSSES, VIEWS, Replay
from benchmarks.study import HELD_OUT, Step, Study, Trained, Variant, by_name, choose
from examples.pair import ModelOption
from examples.real_vlm.build import TARGET
from examples.real_vlm.questions import write_questions
from examples.real_vlm.samples import HELD_OUT as FIRST_SEED
from examples.real_vlm.samples import KINDS, Own
from vllm_vispec.bench.bootstrap import with_interval
from vllm_vispec.bench.datasets import DatasetOptions, load_dataset
from vllm_vispec.bench.heads import zeroed_head
from vllm_vispec.bench.matrix import MatrixSettings, points
from vllm_vispec.bench.metrics import BASELINE, SPEEDUPS, baseline_key, by_key, measure, only_family
from vllm_vispec.bench.runner import Tools, run_matrix
from vllm_vispec.bench.schema import IMAGES_AS_THEY_ARE, BenchRun
from vllm_vispec.cli.options import exit_on_error
from vllm_vispec.heads.folder import DRAFT_VOCAB
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import read_json, writing

SHIPPED = Path("examples/real_vlm/checkpoints/head")
SERVE = "--max-model-len 4096 --enforce-eager"
WORK = Path("out/real")
VOCAB_SIZE, K = 8192, "5"
FIRST, ZEROED, QUICK = "vispec", "zeroed", "quick"
SIZE_INCHES = (15, 4.5)


SETTINGS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
ARMS = by_name(*(Variant(name, epochs=(1,), **arm) for name, arm in SETTINGS["arms"].items()))


@dataclass(frozen=True)
class RealStudy(Study):
    """The study of the real pair; `own` has what SmolLM2 writes itself."""

    own: Path = Path("out/real_vlm/own")

    base_recipe: ClassVar[str] = "examples/recipes/real.yaml"
    base: ClassVar[Mapping[str, str]] = {}
    question_sets: ClassVar = (
        ("mixed", "train", 2 * FIRST_SEED, tuple(KINDS), 1.0),
        ("text", "train", 3 * FIRST_SEED, ("chat",), 1.0),
        (HELD_OUT, "heldout", FIRST_SEED, tuple(KINDS), 0.0),
    )
    limits: ClassVar = (400, 4096)

    def write_questions(
        self, folder: Path, split: str, start: int, count: int, families: Sequence[str]
    ) -> None:
        """Write a question set; see `Study`."""
        own = Own.read(self.own, held_out=split == "heldout")
        if split == "train" and not own.chats:
            raise ViSpecError(
                f"{self.own} has no texts of SmolLM2's own: run `python -m examples.real_vlm.own`"
            )
        write_questions(folder, own, start, count, families)

    def _train_variant(self, variant: Variant, seed: int) -> None:
        """Train an arm, or zero an adaptor; then rank the tokens that the head may propose."""
        head = self.head(Trained(variant, 1, seed))
        if variant.name != ZEROED:
            super()._train_variant(variant, seed)
        elif not head.is_dir():
            with writing(head) as aside:
                zeroed_head(str(self.head(Trained(ARMS[FIRST], 1, seed))), aside)
        if not (head / DRAFT_VOCAB).is_file():
            answers = self.questions("mixed") / "answers.jsonl"
            flags = ("--target", self.target, "--head", str(head), "--data", str(answers))
            self._vispec(["vocab", *flags, "--size", str(VOCAB_SIZE)], "vocab")

    def measure(self, tools: Tools) -> None:
        """Replay every head, then serve those of the first seed; what is done is kept."""
        os.environ.setdefault("OMP_NUM_THREADS", THREADS)  # of servers
        heads = [one for one in self.heads() if self.head(one).is_dir()]
        real_replay.replay_heads(self, heads)
        data = self.questions(HELD_OUT) / "answers.jsonl"
        for trained in (one for one in heads if one.seed == self.seeds[0]):
            served = SETTINGS["served"]
            for name, matrix in served.get(trained.variant.name, served["others"]).items():
                head, chosen = self.head(trained), {"serve_args": SERVE} | matrix
                vocab = {"draft_vocab": "auto"} if (head / DRAFT_VOCAB).exists() else {}
                families = chosen.pop("families", ())
                settings = MatrixSettings(
                    **chosen,
                    target=self.target,
                    head=str(head),
                    speculative_config=vocab,
                    design="star",
                    waves=1,
                    least=self.per_family,
                )
                options = DatasetOptions(families=families, max_tokens=self.limits[0])
                samples = load_dataset("openai", data, options).samples
                run_matrix(
                    settings, samples, self.root / "served" / trained.name / name, tools=tools
                )

    def findings(self) -> dict[str, Any]:
        """Return the JSON's content: every arm of which all seeds were replayed."""
        arms = []
        for variant in self.variants:
            heads = [Trained(variant, 1, seed) for seed in self.seeds]
            files = [self.result(real_replay.REPLAYED, one) for one in heads]
            if not all(file.is_file() for file in files):
                continue
            seeds = [[Replay.from_json(one) for one in read_json(file)] for file in files]
            runs = sorted((self.root / "served" / heads[0].name).glob("*"))
            arms.append(
                {
                    "arm": variant.name,
                    "label": variant.label,
                    "settings": variant.settings,
                    "acceptance": real_replay.acceptance(seeds),
                    "content": real_replay.content(seeds),
                    "served": [row for run in runs for row in served_rows(BenchRun.load(run))],
                }
            )
        settings = {"samples": self.samples, "held_out": self.held_out, "seeds": self.seeds}
        return {"settings": settings | {"recipe": self.base_recipe}, "arms": arms}


def served_rows(run: BenchRun) -> Iterator[dict[str, Any]]:
    """Yield a row for every cell of a matrix, and at its first point for every kind of prompt.

    A row of plain vLLM says how many of its answers to single requests it gives in a batch, too.
    """
    groups, first = by_key(run.cells), set(points(run.settings)[0])
    dtype = "float32" if "float32" in run.settings["serve_args"] else "bfloat16"
    for key, cells in groups.items():
        is_plain = key.variant == BASELINE
        beside = groups.get(replace(key, concurrency=1) if is_plain else baseline_key(key), ())
        kinds = dict.fromkeys(one.family for cell in cells for one in cell.requests)
        for kind in (ALL, *(kinds if key in first and not is_plain else ())):
            mine, plain = (
                side if kind == ALL else only_family(side, kind) for side in (cells, beside)
            )
            row = {**key.to_json(), "dtype": dtype, "kind": kind}
            row |= {name: measure(name, mine, plain) for name in NUMBERS}
            for name in () if is_plain else SPEEDUPS:
                found = with_interval(name, mine, plain)
                ends = {"mean": found.value, "low": found.low, "high": found.high}
                row[name] = None if found.low is None else ends
            yield row


NUMBERS = ("acceptance_length", "identical_outputs")
ASKED = ("variant", "dtype", "num_speculative_tokens", "concurrency", "temperature", "image_tokens")


def to_markdown(found: Mapping[str, Any]) -> str:
    """The tables of the page."""
    arms = found["arms"]
    kinds = list(arms[0]["acceptance"]) if arms else []
    lengths = [[f"acceptance_length, K = {K}", *kinds]]
    depths = [["acceptance_length", *map(str, DRAFT_TOKENS), "rate per position, largest K"]]
    shares = [["right drafts", "tokens", *map(str, range(1, DRAFT_TOKENS[-1] + 1))]]
    speeds = [["served", *ASKED, "kind", *SPEEDUPS, *NUMBERS]]
    for arm in arms:
        label, by_kind, by_class = arm["label"], arm["acceptance"], arm["content"]
        lengths.append([label, *(shown(by_kind[x][K]["acceptance_length"]) for x in kinds)])
        every = [by_kind[ALL][str(k)] for k in DRAFT_TOKENS]
        rates = _numbers(every[-1]["acceptance_rate_per_position"])
        depths.append([label, *(shown(one["acceptance_length"]) for one in every), rates])
        for name in CLASSES:
            means = [by_class[name][row]["mean"] for row in (VIEWS[0], *LOSSES)]
            cells = [_numbers(one) for one in zip(*means, strict=True)]
            shares.append([label, name, *cells])
        for row in (x for x in arm["served"] if arm is arms[0] or x["kind"] == ALL):
            cells = [str(row[name]) for name in (*ASKED, "kind")]
            cells += [shown(row.get(name)) for name in SPEEDUPS]
            numbers = ([] if row[name] is None else [row[name]] for name in NUMBERS)
            speeds.append([label, *cells, *(_numbers(one) for one in numbers)])
    titles = (
        "By kind of prompt",
        "By K",
        "What the image is worth: right drafts, and what is lost with another image, a blank one",
        "Served",
    )
    return report.join_tables(zip(titles, (lengths, depths, shares, speeds), strict=True))


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Draw acceptance of the arms, what the first one gains from the image, and its speedups."""
    arms, colors = found["arms"], report.COLORS
    with report.picture(file, SIZE_INCHES) as figure:
        left, middle, right = figure.subplots(1, 3)
        lengths = [arm["acceptance"][ALL][K]["acceptance_length"] for arm in arms]
        means, errors = report.means_and_errors(lengths)
        left.barh([arm["label"] for arm in arms], means, xerr=errors, color=colors[0], capsize=3)
        left.invert_yaxis()
        left.set_xlim(left=1.0)
        left.set_xlabel(f"acceptance_length (K = {K}, 95 % interval)")
        for name, style in zip(CLASSES, ("-", "--"), strict=True):
            for view, color in zip(VIEWS, colors, strict=False):
                shares = arms[0]["content"][name][view]["mean"]
                places = range(1, len(shares) + 1)
                middle.plot(places, shares, style, color=color, label=f"{name}, image {view}")
        middle.set_xlabel(f"draft position, {arms[0]['label']}")
        middle.set_ylabel("share of right drafts behind right ones")
        usual = ["bfloat16", int(K), 0, IMAGES_AS_THEY_ARE, ALL]
        names = ("dtype", "num_speculative_tokens", "temperature", "image_tokens", "kind")
        lines: dict[str, dict[int, float]] = {}
        for row in arms[0]["served"]:
            if row.get("decode_speedup") and [row[name] for name in names] == usual:
                line = lines.setdefault(row["variant"], {})
                line[row["concurrency"]] = row["decode_speedup"]["mean"]
        for (variant, line), color in zip(lines.items(), colors, strict=False):
            right.plot(list(line), list(line.values()), "o-", color=color, label=variant)
        right.axhline(1.0, color=colors[-1], linewidth=0.8)
        right.set_xlabel("requests at once")
        right.set_ylabel("decode_speedup over plain vLLM")
        for axes in (middle, right):
            report.legend(axes)


def main(
    model: ModelOption = str(TARGET),
    quick: Annotated[bool, typer.Option("--quick", help="Measure --head alone.")] = False,
    head: Annotated[Path, typer.Option(help="Of --quick: a head that is there.")] = SHIPPED,
    own: Annotated[Path, typer.Option(help="What SmolLM2 wrote.")] = RealStudy.own,
    work_dir: Annotated[Path, typer.Option(help="Data, runs and results so far.")] = WORK,
    step: Annotated[list[Step] | None, typer.Option(help="Only these parts; repeat.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeat. Default: 0.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Repeat. Default: all.")] = None,
    samples: Annotated[int, typer.Option(min=9, help="Of each training set.")] = 5_400,
    held_out: Annotated[int, typer.Option(min=18, help="Dialogues to measure on.")] = 180,
    threads: ThreadsOption = 1,
    output: Annotated[Path, typer.Option(help="JSON file.")] = report.RESULTS / "real.json",
    page: Annotated[Path, typer.Option(help="Page with the tables.")] = report.PAGES / "real.md",
) -> None:
    """Drafts for a real language model: does a draft need the image?"""
    arms = tuple(ARMS[name] for name in choose("--arm", arm, ARMS))
    root, seeds, steps = work_dir.resolve(), tuple(seed or (0,)), set(step or Step)
    tools = Tools(log=typer.echo)
    with exit_on_error():
        for option, folder in (("--model", Path(model)), ("--head", head))[: 1 + quick]:
            if not (folder / "config.json").is_file():
                raise ViSpecError(f"{option} {folder} is not there: see docs/evidence/real.md")
        if quick:
            shutil.rmtree(root / QUICK, ignore_errors=True)  # of another head or target
            variant = Variant(QUICK, str(head), "vispec", epochs=(1,))
            study = RealStudy(root / QUICK, model, (variant,), (0,), 0, 27, 14, threads, own)
            study.answer({HELD_OUT})
            shutil.copytree(head, study.head(study.heads()[0]))
            study.measure(tools)
            found = study.findings()
            print(to_markdown(found))
            report.write_report(study.root / "real.json", found)
            return
        study = RealStudy(root, model, arms, seeds, samples, held_out, 28, threads, own)
        if Step.PREPARE in steps:
            study.prepare()
        if Step.TRAIN in steps:
            study.train()
        if Step.MEASURE in steps:
            study.measure(tools)
        if Step.REPORT in steps:
            report.publish(output, page, study.findings(), to_markdown, draw)
