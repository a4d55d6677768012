"""Settings of a regeneration job: the options of `vispec regenerate`, and what they answer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from vllm_vispec.data.image_bounds import NAMES, Bounds, bounds_in, set_bounds
from vllm_vispec.data.images import image_folder
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import Turn
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import Settings

PROMPT_STYLES: Mapping[str, str] = {
    "auto": "",
    "none": "",
    "long": "Answer at length, with at least 1000 words.",
    "detailed": "Answer in detail and mention everything you see.",
    "reasoning": "Think step by step and write every step down.",
}
"""What is added to a question as a sentence of its own, so that the target answers at length.

A draft head learns from the target's own words, and there are few of them in a one-word answer.
ViSpec asks for at least 1000 words (arXiv 2509.15235, training data). The style "auto" is `long`
for a question that shows an image and `none` for others: a dialogue of long answers to every turn
would outgrow the training's data.max_length."""
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
DEFAULT_QUESTION = "Describe this image."


class RegenerateSettings(Settings):
    """What decides about the answers, and where they are made."""

    input: Path = Field(
        description="JSON lines or a JSON array, LLaVA or OpenAI style; an image folder; a parquet "
        "file or hf://org/name:split."
    )
    output: Path = Field(description="JSON lines file; an earlier run is continued.")
    target: str = Field(
        default="", description="Folder or hub id of the target; optional with --server."
    )
    image_root: Path | None = Field(
        default=None, description="Where image paths start; default: the input's folder."
    )
    prompt_style: Literal["auto", "none", "long", "detailed", "reasoning"] = Field(
        default="auto",
        description=f"Added to questions: {', '.join(PROMPT_STYLES)}; auto: long where an image is "
        "shown, else none.",
    )
    prompt_text: str = Field(default="", description="Your own words instead of a style.")
    # Sampled answers keep the head from reading the next token out of the hidden state (ViSpec,
    # arXiv 2509.15235, training data; so is the number of tokens).
    temperature: float = Field(default=1.0, ge=0, le=10, description="0 is greedy.")
    held_out: float = Field(
        default=0.0,
        ge=0,
        le=0.9,
        description="Share of samples answered greedily: vispec train holds these out.",
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus of the sampling.")
    max_tokens: int = Field(default=1024, ge=1, description="Per answer.")
    seed: int = Field(
        default=0, description="With a sample's id and the turn it gives the answer's seed."
    )
    min_pixels: int = Field(
        default=0, ge=0, description="Smaller images are enlarged to this; 0: by the target."
    )
    max_pixels: int = Field(
        default=0,
        ge=0,
        description="Larger images are reduced to this; 0: by the target, 1280 tokens where it "
        "takes 16384.",
    )
    shard_samples: int = Field(
        default=100_000,
        ge=1,
        description="Most samples of a file; a larger input gets several, and a list of them.",
    )
    strict: bool = Field(
        default=False, description="Reject answers whose text has other tokens in the template."
    )
    dtype: str = Field(default="auto", description="The engine's dtype.")
    max_model_len: int | None = Field(
        default=None, description="Longest prompt plus answer; default: the target's."
    )
    engine: dict[str, Any] = Field(
        default={}, description="JSON object of further vllm.LLM settings."
    )
    server: str = Field(default="", description="URL of a running vllm serve instead.")
    concurrency: int = Field(
        default=256,
        ge=1,
        description="Open requests to the server; about 256 for each of its GPUs.",
    )
    workers: int = Field(
        default=1,
        ge=1,
        description="Engines, each on GPUs of its own; with --ray over several machines.",
    )

    @model_validator(mode="after")
    def _has_target(self) -> RegenerateSettings:
        if not self.target and not self.server:
            raise ValueError("--target is missing: give the target's folder or hub id")
        return self

    def with_absolute_paths(self) -> RegenerateSettings:
        """Return the settings for processes in other folders."""
        return self.model_copy(
            update={
                "target": _absolute(self.target),
                "input": self.input.absolute(),
                "output": self.output.absolute(),
                "image_root": self.image_root and self.image_root.absolute(),
            }
        )

    def with_image_bounds(self) -> RegenerateSettings:
        """Return the settings with the bounds that images are read with, which the target decides.

        Raises:
            ViSpecError: the target has no processor, or cannot have such bounds.
        """
        if not self.target:
            return self
        bounds = set_bounds(load_processor(self.target), self.image_bounds)
        sized = {*NAMES} & {*self.engine.get("mm_processor_kwargs", {})}
        if sized:
            raise ViSpecError(
                f"--engine sets {', '.join(sorted(sized))} of mm_processor_kwargs: give it as "
                "--min-pixels and --max-pixels, which training reads from the answers"
            )
        return self.model_copy(update=bounds)

    @property
    def image_bounds(self) -> Bounds:
        """The bounds that are set."""
        return bounds_in(vars(self))

    @property
    def images_from(self) -> Path:
        """Folder that relative image paths of the input start from."""
        return image_folder(self.input, self.image_root)

    def beside(self, kind: str) -> Path:
        """Return the path of a file that belongs to the output."""
        return self.output.with_name(f"{self.output.name}.{kind}")

    def request(self, turns: Sequence[Turn]) -> str:
        """Return what is added to a question, the last of these turns."""
        style = self.prompt_style
        if style == "auto" and any(part.image for turn in turns for part in turn.parts):
            style = "long"
        return self.prompt_text or PROMPT_STYLES[style]

    @property
    def style_name(self) -> str:
        """Name of the prompt style for the record."""
        return "own" if self.prompt_text else self.prompt_style

    def seed_of(self, sample_id: str, answer: int) -> int:
        """Return the seed of the answer with this number: 32 bits, independent of the order."""
        text = f"{self.seed}\0{sample_id}\0{answer}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

    def temperature_of(self, sample_id: str) -> float:
        """Return the temperature of a sample's answers: 0 for those to be held out."""
        is_held_out = self.seed_of(sample_id, -1) < self.held_out * 2**32
        return 0.0 if is_held_out else self.temperature

    def fingerprint(self) -> dict[str, Any]:
        """Return what two runs must share to write to one file, the input's hash left out."""
        names = ("temperature", "top_p", "max_tokens", "seed", "strict", "dtype", "max_model_len")
        return {
            "target": _absolute(self.target),
            "prompt_style": self.style_name,
            "request": self.prompt_text or PROMPT_STYLES[self.prompt_style],
            **{name: getattr(self, name) for name in names},
            **self.image_bounds,
            **({"held_out": self.held_out} if self.held_out else {}),
        }


def _absolute(target: str) -> str:
    """A local folder as an absolute path, a hub id as it is."""
    return os.path.abspath(target) if target and Path(target).is_dir() else target


def write_questions(settings: RegenerateSettings, questions: Sequence[str] = ()) -> Path:
    """Ask one question about every image below the input, a folder; the questions in turns.

    Image paths in the file start from the file's own folder. The same images and questions give
    the same file, so a stopped job goes on.

    Returns:
        The file, beside the output.

    Raises:
        ViSpecError: the folder has no image, or the file has other questions.
    """
    folder = settings.input
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    images = sorted(path for path in found if path.is_file())
    if not images:
        raise ViSpecError(
            f"--input {folder} has no image ({', '.join(IMAGE_SUFFIXES)}): give a folder of images"
        )
    file = settings.beside("questions.jsonl")
    content = ""
    for image, question in zip(images, cycle(questions or (DEFAULT_QUESTION,)), strict=False):
        path = {"type": "image", "image": os.path.relpath(image, file.parent)}
        asked = {"role": "user", "content": [path, {"type": "text", "text": question}]}
        name = image.relative_to(folder).as_posix()
        content += json.dumps({"id": name, "messages": [asked]}) + "\n"
    if file.is_file() and file.read_text(encoding="utf-8") != content:
        raise ViSpecError(
            f"{file} has other questions than the images in {folder} would get now: choose another "
            "--output, or go on with --input and that file"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    return file
