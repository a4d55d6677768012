"""Golden cases: reading them and turning their models into folders that stock vLLM serves."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.tiny_processors import PROCESSORS, TEMPLATES, ImageSettings
from tests.support.tiny_tokenizers import fast_tokenizer, word_level_tokenizer

if TYPE_CHECKING:
    import torch

TREE = {"policy": "eagle2", "depth": 3, "top_k": 8}
TREE_NODES = 29
"""The trees of the recorded runs: 30 nodes with the root."""

DEFAULT_CASES = Path(__file__).resolve().parents[1] / "golden_cases"


def golden_dir() -> Path:
    """Return the folder of golden cases: ``VISPEC_GOLDEN_DIR`` or the copy in ``tests/``."""
    return Path(os.environ.get("VISPEC_GOLDEN_DIR") or DEFAULT_CASES)


@dataclass(frozen=True)
class GoldenCase:
    """One recorded case; tensors are read on first use (see the fixtures' README)."""

    name: str
    folder: Path
    target_dir: Path
    draft_dir: Path
    num_draft_tokens: int
    image_runs: tuple[tuple[int, int], ...]

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All recorded tensors by name."""
        from safetensors.torch import load_file

        return load_file(self.folder / "tensors.safetensors")

    @property
    def pair(self) -> tuple[Path, Path, int]:
        """Target folder, draft folder and K: cases with the same pair can share an engine."""
        return self.target_dir, self.draft_dir, self.num_draft_tokens

    @property
    def greedy_ids(self) -> list[int]:
        """Output ids of plain greedy decoding."""
        return self._ints("greedy_ids")

    @property
    def accept_lengths(self) -> list[int]:
        """Accepted draft tokens of every verification round of the recorded chain run."""
        return self._ints("chainspec_accept_lengths")

    @property
    def tree_accept_lengths(self) -> list[int]:
        """Accepted draft tokens of every verification round of the recorded tree run."""
        return self._ints("tree_accept_lengths")

    def _ints(self, name: str) -> list[int]:
        return [int(value) for value in self.tensors[name].tolist()]


def load_cases(folder: Path | None = None) -> list[GoldenCase]:
    """Return every case below ``folder`` (default :func:`golden_dir`), sorted by name."""
    root = folder or golden_dir()
    return [_load_case(path.parent, root) for path in sorted(root.glob("*/case.json"))]


def _load_case(folder: Path, root: Path) -> GoldenCase:
    meta = json.loads((folder / "case.json").read_text())
    return GoldenCase(
        name=meta["name"],
        folder=folder,
        target_dir=root / meta["target"],
        draft_dir=root / meta["draft"],
        num_draft_tokens=int(meta["K"]),
        image_runs=tuple((int(a), int(b)) for a, b in meta["image_runs_in_prompt"]),
    )


def materialise_target(target_dir: Path, out: Path) -> Path:
    """Write ``target_dir`` with tokenizer and processor to ``out``, ready for ``vllm.LLM``.

    The checkpoint keeps its transformers-4.49 tensor names, which vLLM's weight mappers accept.
    """
    config = json.loads((target_dir / "config.json").read_text())
    kind = config["model_type"]
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = fast_tokenizer(
        word_level_tokenizer(_vocab_size(config), special_tokens(config)),
        **_ROLES[kind],
        template=TEMPLATES[kind],
    )
    processor = PROCESSORS[kind](_image_settings(config), tokenizer)
    processor.save_pretrained(out)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(target_dir / name, out / name)
    return out


_ROLES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"eos": "<|im_end|>", "pad": "<|endoftext|>", "bos": None},
    "llava_next": {"eos": "</s>", "pad": "<pad>", "bos": "<s>"},
}


def _vocab_size(config: dict[str, Any]) -> int:
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])


def special_tokens(config: dict[str, Any]) -> dict[str, int]:
    """Return the special tokens that a golden target's ``config`` implies, with their ids."""
    if config["model_type"] == "llava_next":
        return {"<pad>": 0, "<s>": 1, "</s>": 2, "<image>": config["image_token_index"]}
    return {
        "<|endoftext|>": 0,
        "<|vision_start|>": config["vision_start_token_id"],
        "<|vision_end|>": config["vision_end_token_id"],
        "<|image_pad|>": config["image_token_id"],
        "<|video_pad|>": config["video_token_id"],
        "<|im_start|>": config["bos_token_id"],
        "<|im_end|>": config["eos_token_id"],
    }


def _image_settings(config: dict[str, Any]) -> ImageSettings:
    vision = config["vision_config"]
    pinpoints = config.get("image_grid_pinpoints", [])
    return ImageSettings(
        patch_size=vision["patch_size"],
        merge_size=vision.get("spatial_merge_size", 1),
        image_size=vision.get("image_size", 56),
        grid_pinpoints=tuple((pair[0], pair[1]) for pair in pinpoints),
    )


def engine_prompt(case: GoldenCase, model_dir: Path) -> dict[str, Any]:
    """Return the case as a vLLM prompt: token ids plus the recorded image embeddings.

    Needs an engine with ``enable_mm_embeds=True``. Each image is collapsed to one placeholder,
    which vLLM expands again to the number of embedding rows.
    """
    ids = [int(token) for token in case.tensors["input_ids"].tolist()]
    if not case.image_runs:
        return {"prompt_token_ids": ids}
    spans = _image_spans(case, model_dir)
    embeds = [case.tensors["inputs_embeds"][a:b].contiguous() for a, b in spans]
    prompt: list[int] = []
    position = 0
    for start, end in spans:
        prompt += ids[position : start + 1]
        position = end
    prompt += ids[position:]
    return {"prompt_token_ids": prompt, "multi_modal_data": {"image": _mm_item(case, embeds)}}


def _mm_item(case: GoldenCase, embeds: list[torch.Tensor]) -> Any:
    import torch

    if "image_grid_thw" in case.tensors:
        grid = case.tensors["image_grid_thw"]
        return {"image_embeds": torch.cat(embeds), "image_grid_thw": grid}
    return embeds


def _image_spans(case: GoldenCase, model_dir: Path) -> list[tuple[int, int]]:
    """Split the recorded runs (touching images share one) into one span per image."""
    spans: list[tuple[int, int]] = []
    sizes = _image_token_counts(case, model_dir)
    for start, end in case.image_runs:
        while start < end:
            spans.append((start, start + sizes[len(spans)]))
            start = spans[-1][1]
    return spans


def _image_token_counts(case: GoldenCase, model_dir: Path) -> list[int]:
    if "image_grid_thw" in case.tensors:
        merge = json.loads((model_dir / "config.json").read_text())["vision_config"]
        area = int(merge["spatial_merge_size"]) ** 2
        return [int(t * h * w) // area for t, h, w in case.tensors["image_grid_thw"].tolist()]
    if len(case.image_runs) == len(case.tensors["image_sizes"]):
        return [end - start for start, end in case.image_runs]
    from transformers import LlavaNextProcessor

    processor = LlavaNextProcessor.from_pretrained(model_dir)
    sizes = [[int(h), int(w)] for h, w in case.tensors["image_sizes"].tolist()]
    counts = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    return [int(count) for count in counts]
