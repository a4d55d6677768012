"""Settings of a regeneration job."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_vispec.data.images import image_folder
from vllm_vispec.data.regenerate.prompts import PROMPT_STYLES
from vllm_vispec.utils.errors import ViSpecError

DEFAULT_TEMPERATURE = 1.0
"""Sampled answers keep the head from reading the next token out of the hidden state (ViSpec,
arXiv 2509.15235, section on training data)."""
DEFAULT_MAX_TOKENS = 1024
"""New tokens per answer in ViSpec's data."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. ``temperature`` 0 is greedy; ``seed`` and the sample id give the
    seed of each answer. ``ignore_eos`` is for measurements only."""

    temperature: float = DEFAULT_TEMPERATURE
    top_p: float = 1.0
    max_tokens: int = DEFAULT_MAX_TOKENS
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ViSpecError: a value is out of range.
        """
        if not 0.0 <= self.temperature <= 10.0:
            raise ViSpecError(f"--temperature {self.temperature}: choose 0 (greedy) to 10")
        if not 0.0 < self.top_p <= 1.0:
            raise ViSpecError(f"--top-p {self.top_p}: choose more than 0 and at most 1")
        if self.max_tokens < 1:
            raise ViSpecError(f"--max-tokens {self.max_tokens}: choose at least 1")

    def seed_of(self, sample_id: str, answer: int) -> int:
        """Return the seed of the answer with this number: 32 bits, independent of the order."""
        text = f"{self.seed}\0{sample_id}\0{answer}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@dataclass(frozen=True)
class RegenerateSettings:
    """What decides about the answers, and where they are made.

    ``target`` is a folder or hub id ("" only with a server). ``prompt_text`` is a request of one's
    own that takes the style's place. ``engine`` goes to ``vllm.LLM`` unchanged. ``strict`` rejects
    answers that do not survive the chat template.
    """

    target: str
    input: Path
    output: Path
    image_root: Path | None = None
    prompt_style: str = "long"
    prompt_text: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    strict: bool = False
    dtype: str = "auto"
    max_model_len: int | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    server: str = ""
    concurrency: int = 32
    workers: int = 1

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything.

        Raises:
            ViSpecError: a setting is unknown, out of range or missing.
        """
        if self.prompt_style not in PROMPT_STYLES:
            known = ", ".join(PROMPT_STYLES)
            raise ViSpecError(f"--prompt-style {self.prompt_style}: choose one of {known}")
        if not self.target and not self.server:
            raise ViSpecError("--target is missing: give the target's folder or hub id")
        for name, value in (("--workers", self.workers), ("--concurrency", self.concurrency)):
            if value < 1:
                raise ViSpecError(f"{name} {value}: choose at least 1")

    def anywhere(self) -> RegenerateSettings:
        """Return the settings with absolute paths, for processes in other folders."""
        return replace(
            self,
            target=absolute_target(self.target),
            input=self.input.absolute(),
            output=self.output.absolute(),
            image_root=None if self.image_root is None else self.image_root.absolute(),
        )

    @property
    def images_from(self) -> Path:
        """Folder that relative image paths of the input start from."""
        return image_folder(self.input, self.image_root)

    @property
    def request(self) -> str:
        """What is added to every question."""
        return self.prompt_text or PROMPT_STYLES[self.prompt_style].request

    @property
    def style_name(self) -> str:
        """Name of the prompt style for the record."""
        return "own" if self.prompt_text else self.prompt_style

    def fingerprint(self) -> dict[str, Any]:
        """Return what two runs must share to write to one file, the input's hash left out."""
        return {
            "target": absolute_target(self.target),
            "prompt_style": self.style_name,
            "request": self.request,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_tokens,
            "seed": self.sampling.seed,
            "strict": self.strict,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
        }


def absolute_target(target: str) -> str:
    """Return a local folder as an absolute path, a hub id as it is."""
    return os.path.abspath(target) if target and Path(target).is_dir() else target
