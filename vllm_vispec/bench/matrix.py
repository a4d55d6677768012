"""What is compared: variants, the settings of a matrix, the order in which cells are measured."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from vllm_vispec.bench.heads import plain_eagle_head, random_head, zeroed_head
from vllm_vispec.bench.schedules import K_SETTING, SETTING, Ranges, as_schedule, speculative_config
from vllm_vispec.bench.schema import IMAGES_AS_THEY_ARE, CellKey
from vllm_vispec.trees.settings import THRESHOLDS
from vllm_vispec.trees.sizes import MAX_DEPTH
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import CommandSettings, CommaSeparated, as_flag

MAX_DRAFT_TOKENS = 32
Temperature = Annotated[float, Field(ge=0, le=10)]
NumDraftTokens = Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS)]
AS_THEY_ARE = "native"
"""Stands for images of their own size in a list of numbers of image tokens."""
AXES = ("variants", "concurrency", "num_speculative_tokens", "temperatures", "image_tokens")
"""Settings that a later call may widen; all others must stay as they were in a run's folder."""
POINT_AXES: Mapping[str, str] = MappingProxyType(
    {
        "num_speculative_tokens": "num_speculative_tokens",
        "image_tokens": "image_tokens",
        "temperature": "temperatures",
        "concurrency": "concurrency",
    }
)
"""Fields of a cell's key by the setting that lists their values; the last one varies fastest."""
# vLLM's lookup looks for the longest repeated n-gram between these lengths.
NGRAM = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}
LEAST_PATH, MOST_PATH = 2, MAX_DEPTH + 1
"""K of single paths that end early."""
NO_DRAFT = {K_SETTING: 1, SETTING: [[1, 1, 0]]}
"""K = 0 as vLLM takes it: the draft is loaded and kept up, and proposes nothing."""


def _image_tokens(given: Any) -> Any:
    return IMAGES_AS_THEY_ARE if given == AS_THEY_ARE else given


def _words(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return shlex.split(given)
    except ValueError as error:
        raise ViSpecError(f"--serve {given}: {error}; close the quote") from error


ImageTokens = Annotated[
    tuple[Annotated[int, BeforeValidator(_image_tokens), Field(ge=IMAGES_AS_THEY_ARE)], ...],
    CommaSeparated,
]
ServeArgs = Annotated[tuple[str, ...], BeforeValidator(_words)]
"""A command line, or its words."""
Repetition = tuple[CellKey, int]
"""One measurement of a cell; the number counts from 0."""


class MatrixSettings(CommandSettings):
    """The matrix and what all its cells share."""

    target: str = Field(description="Target: a folder or hub id.")
    dataset: str = Field(
        default="openai", description="How to read --data: mmspec, vispec, openai or tiny."
    )
    head: str | None = Field(
        default=None, description="Draft: a head or a published model, folder or hub id."
    )
    eagle_head: str | None = Field(
        default=None, description="Text-trained head for the variant eagle."
    )
    sibling: str | None = Field(
        default=None, description="Published model of the target's family for sibling variants."
    )
    speculative_config: dict[str, Any] = Field(
        default={},
        description='More for ViSpec\'s draft, e.g. \'{"tree": {"depth": 5}}\'.',
    )
    variants: Annotated[tuple[str, ...], CommaSeparated] = Field(
        default=("plain", "vispec"),
        description="Of plain, ngram, eagle, vispec_zeroed, vispec, vispec_tuned, "
        "vispec_adaptive, vispec_random, sibling, sibling_prune, sibling_none; spec_llava:0.3 or "
        "entropy:0.1: single paths with this threshold, K from 2 to 16.",
    )
    concurrency: Annotated[tuple[PositiveInt, ...], CommaSeparated] = Field(
        default=(1,), description="Requests in flight, e.g. 1,4,16. Each value is a cell."
    )
    num_speculative_tokens: Annotated[tuple[NumDraftTokens, ...], CommaSeparated] = Field(
        default=(4,),
        description="K, e.g. 3,5. Each value has servers of its own; at 0 the draft is kept up.",
        json_schema_extra={"flags": ["--num-speculative-tokens", "-k"]},
    )
    schedule: Annotated[Ranges, BeforeValidator(as_schedule)] = Field(
        default=(), description="K by batch size for vispec_tuned: JSON or a file."
    )
    temperatures: Annotated[tuple[Temperature, ...], CommaSeparated] = Field(
        default=(0.0,), description="0 is greedy; e.g. 0,1."
    )
    image_tokens: ImageTokens = Field(
        default=(IMAGES_AS_THEY_ARE,),
        description="Image tokens of a request, e.g. native,0,256; 0 sends no image.",
        json_schema_extra={"default": AS_THEY_ARE},
    )
    design: Literal["full", "star"] = Field(
        default="full",
        description="full: every combination; star: each axis alone, the others at their first.",
    )
    repetitions: PositiveInt = Field(default=3, description="Of every cell.")
    waves: PositiveInt = Field(default=2, description="Questions of a cell per request in flight.")
    least: PositiveInt = Field(
        default=24, description="Questions of a cell, at least, or all there are."
    )
    warm_up: NonNegativeInt = Field(
        default=2, description="Requests before a server's first cell; they are not recorded."
    )
    serve_args: ServeArgs = Field(
        default=(),
        description="Options of vllm serve for all variants, one string.",
        json_schema_extra={"flags": ["--serve"]},
    )
    cell_timeout_s: float = Field(
        default=7200.0,
        description="Longest cell, in seconds.",
        json_schema_extra={"flags": ["--cell-timeout"]},
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in AXES:
            values = getattr(self, name)
            if not values:
                raise ViSpecError(f"{as_flag(name)} has no value: give at least one")
            if len(set(values)) < len(values):
                raise ViSpecError(f"{as_flag(name)} names a value twice: name each once")
        for name in self.variants:
            variant = find_variant(name)
            if variant is None:
                known = ", ".join(VARIANTS)
                raise ViSpecError(
                    f"--variants: {name} is unknown: choose from {known}, or write a policy of "
                    "single paths and its threshold, like spec_llava:0.3"
                )
            if not any(map(variant.takes, self.num_speculative_tokens)):
                raise ViSpecError(
                    f"--variants: {name} drafts {LEAST_PATH} to {MOST_PATH} tokens: give such a K"
                )
            for needed in variant.needs:
                if not getattr(self, needed):
                    raise ViSpecError(
                        f"--variants: {name} needs {as_flag(needed)}: give it, or leave {name} out"
                    )
        return self

    def num_questions(self, concurrency: int) -> int:
        """Return how many questions a cell asks, if the dataset has as many."""
        return max(self.waves * concurrency, self.least)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; how long a cell may take is no setting of a run."""
        content = self.model_dump(mode="json", exclude={"cell_timeout_s"})
        # None as in runs from before there was such a setting.
        return content | {
            name: content[name] or None for name in ("schedule", "speculative_config")
        }

    def groups(self) -> Iterator[tuple[int, list[Repetition]]]:
        """Yield, for every K, what is measured while its servers are up, in order.

        All variants of a point follow each other, so that a slow minute hits all of them; who goes
        first alternates from point to point and from repetition to repetition.
        """
        matrix = points(vars(self))
        for num_tokens in self.num_speculative_tokens:
            here = [keys for keys in matrix if keys[0].num_speculative_tokens == num_tokens]
            yield (
                num_tokens,
                [
                    (key, repetition)
                    for repetition in range(self.repetitions)
                    for number, keys in enumerate(here)
                    for key in keys[:: -1 if (repetition + number) % 2 else 1]
                ],
            )


def points(settings: Mapping[str, Any]) -> list[list[CellKey]]:
    """Return the cells of a matrix in order, those that differ only in their variant together.

    Args:
        settings: by name, of `MatrixSettings` or as they were written down.
    """
    found = []
    for chosen in product(*(enumerate(settings[name]) for name in POINT_AXES.values())):
        if settings.get("design") == "star" and sum(place > 0 for place, _ in chosen) > 1:
            continue
        fields = dict(zip(POINT_AXES, (value for _, value in chosen), strict=True))
        fields["dataset"] = settings["dataset"]
        # Variants of earlier releases are not known here.
        found.append(
            [
                CellKey(variant=name, **fields)
                for name in settings["variants"]
                if (known := find_variant(name)) is None
                or known.takes(fields["num_speculative_tokens"])
            ]
        )
    return [keys for keys in found if keys]


@dataclass(frozen=True)
class Variant:
    """One way to serve the target.

    Attributes:
        summary: what a report says about it.
        draft: makes what goes into vLLM's speculative config besides K, from the settings and a
            folder for heads that are made for the run; None: no speculation. A variant that
            chooses K itself puts it there too.
        needs: settings without which it cannot be served.
        path: policy and threshold of single paths that end early; None: it drafts in another way.
    """

    summary: str
    draft: Callable[[MatrixSettings, Path], Mapping[str, Any]] | None
    needs: tuple[str, ...] = ()
    path: tuple[str, float] | None = None

    def takes(self, num_tokens: int) -> bool:
        """Whether it can be served with this K."""
        return self.path is None or LEAST_PATH <= num_tokens <= MOST_PATH

    def tree(self, num_tokens: int) -> dict[str, Any]:
        """Return what goes into the speculative config for paths of up to K draft tokens."""
        if self.path is None:
            return {}
        policy, threshold = self.path
        depth = num_tokens - 1
        return {"tree": {"policy": policy, "depth": depth, "top_k": 1, "threshold": threshold}}

    def speculative_config(
        self, settings: MatrixSettings, folder: Path, num_tokens: int
    ) -> dict[str, Any] | None:
        """Return vLLM's speculative config for this variant, None without speculation.

        Args:
            folder: gets the heads that are made for the run.
            num_tokens: K; 0 keeps the draft up without proposing anything.

        Raises:
            ViSpecError: the variant's head cannot be used.
        """
        if self.draft is None:
            return None
        k = {K_SETTING: num_tokens} if num_tokens else NO_DRAFT
        draft = {**self.draft(settings, folder), **self.tree(num_tokens)}
        return dict(draft) if K_SETTING in draft else {**draft, **k}


def _eagle(settings: MatrixSettings, folder: Path) -> Mapping[str, Any]:
    head = plain_eagle_head(settings.eagle_head or "", settings.target, folder / "eagle")
    return {"method": "eagle", "model": head}


def _vispec_zeroed(settings: MatrixSettings, folder: Path) -> Mapping[str, Any]:
    head = zeroed_head(settings.head or "", folder / "vispec_zeroed")
    return {"method": "vispec", "model": head, "adaptive": False}


def _vispec_random(settings: MatrixSettings, folder: Path) -> Mapping[str, Any]:
    head = random_head(settings.head or "", folder / "vispec_random")
    return {"method": "vispec", "model": head}


def _vispec_adaptive(settings: MatrixSettings, _: Path) -> Mapping[str, Any]:
    return {**settings.speculative_config, "method": "vispec", "model": settings.head}


def _vispec(settings: MatrixSettings, folder: Path) -> Mapping[str, Any]:
    fixed = {"adaptive": False, **settings.speculative_config}
    return {**fixed, "method": "vispec", "model": settings.head}


def find_variant(name: str) -> Variant | None:
    """Return a variant; that of single paths is named by policy and threshold, "entropy:0.1"."""
    policy, _, text = name.partition(":")
    with suppress(ValueError):
        if policy in THRESHOLDS and 0 <= (threshold := float(text)) < 1:
            summary = f"ViSpec with single paths, {policy} with threshold {text}"
            return Variant(summary, _vispec, ("head",), (policy, threshold))
    return VARIANTS.get(name)


def is_path(name: str) -> bool:
    """Whether a variant drafts single paths that end early."""
    variant = find_variant(name)
    return variant is not None and variant.path is not None


def _vispec_tuned(settings: MatrixSettings, folder: Path) -> Mapping[str, Any]:
    return speculative_config(_vispec(settings, folder), settings.schedule) or {}


def _sibling(settings: MatrixSettings, _: Path) -> Mapping[str, Any]:
    return {"method": "vispec", "model": settings.sibling, "adaptive": False}


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "plain": Variant("vLLM without speculation", None),
        "ngram": Variant(
            "vLLM's n-gram lookup in the prompt and the answer; steps in which it finds nothing "
            "are not counted",
            lambda *_: NGRAM,
        ),
        "eagle": Variant("vLLM's EAGLE with a text-trained head", _eagle, ("eagle_head",)),
        "vispec_zeroed": Variant(
            "ViSpec whose vision adaptor puts out zeros", _vispec_zeroed, ("head",)
        ),
        "vispec": Variant("ViSpec", _vispec, ("head",)),
        "vispec_adaptive": Variant(
            "ViSpec with K by load and acceptance, as it is served by default",
            _vispec_adaptive,
            ("head",),
        ),
        "vispec_random": Variant(
            "the same with a head of random weights, of which nothing is accepted",
            _vispec_random,
            ("head",),
        ),
        "vispec_tuned": Variant(
            "ViSpec with K by the number of running requests", _vispec_tuned, ("head", "schedule")
        ),
        "sibling": Variant("a published model of the family drafts", _sibling, ("sibling",)),
        "sibling_prune": Variant(
            "the same, and sees a quarter of an image's tokens",
            lambda *given: {**_sibling(*given), "images": "prune:4"},
            ("sibling",),
        ),
        "sibling_none": Variant(
            "the same, and sees no images",
            lambda *given: {**_sibling(*given), "images": "none"},
            ("sibling",),
        ),
    }
)
