"""Golden cases: reading them and turning their models into folders that stock vLLM serves."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support.tiny_families import FAMILIES, make_processor

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

    meta: dict[str, Any]
    folder: Path
    target_dir: Path
    draft_dir: Path
    num_draft_tokens: int
    image_runs: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All recorded tensors by name."""
        return load_file(self.folder / "tensors.safetensors")

    def ints(self, name: str) -> list[int]:
        """Return a recorded list, such as the output ids of plain greedy decoding."""
        return [int(value) for value in self.tensors[name].tolist()]

    def steps(self, mode: str) -> list[int]:
        """Return the accepted draft tokens of every step of the recorded chain or tree run."""
        return self.ints("tree_accept_lengths" if mode == "tree" else "chainspec_accept_lengths")


def load_cases() -> list[GoldenCase]:
    """Return every case below :func:`golden_dir`, sorted by name."""
    return [_load_case(path.parent) for path in sorted(golden_dir().glob("*/case.json"))]


def _load_case(folder: Path) -> GoldenCase:
    meta = json.loads((folder / "case.json").read_text())
    return GoldenCase(
        meta=meta,
        folder=folder,
        target_dir=folder.parent / meta["target"],
        draft_dir=folder.parent / meta["draft"],
        num_draft_tokens=int(meta["K"]),
        image_runs=tuple((int(a), int(b)) for a, b in meta["image_runs_in_prompt"]),
    )


def materialise_target(target_dir: Path, out: Path) -> Path:
    """Write ``target_dir`` with tokenizer and processor to ``out``, ready for ``vllm.LLM``.

    The checkpoint keeps its transformers-4.49 tensor names, which vLLM's weight mappers accept. The
    tokenizer has a word ``wN`` for every id, so that any generated id can be decoded.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoConfig

    special = special_tokens(json.loads((target_dir / "config.json").read_text()))
    config = AutoConfig.from_pretrained(target_dir)
    names = {token_id: token for token, token_id in special.items()}
    vocab = {names.get(i, f"w{i}"): i for i in range(config.get_text_config().vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="w3"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    shutil.copytree(target_dir, out, dirs_exist_ok=True)
    make_processor(config, tokenizer, FAMILIES[config.model_type]).save_pretrained(out)
    return out


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


def engine_prompt(case: GoldenCase, model_dir: Path) -> dict[str, Any]:
    """Return the case as a vLLM prompt: token ids plus the recorded image embeddings.

    Needs an engine with ``enable_mm_embeds=True``. Each image is collapsed to one placeholder,
    which vLLM expands again to the number of embedding rows.
    """
    ids = case.ints("input_ids")
    if not case.image_runs:
        return {"prompt_token_ids": ids}
    spans = _image_spans(case, model_dir)
    embeds = [case.tensors["inputs_embeds"][start:end].contiguous() for start, end in spans]
    for start, end in reversed(spans):
        del ids[start + 1 : end]
    images: Any = embeds
    if "image_grid_thw" in case.tensors:
        grid = case.tensors["image_grid_thw"]
        images = {"image_embeds": torch.cat(embeds), "image_grid_thw": grid}
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}


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
        config = json.loads((model_dir / "config.json").read_text())
        area = int(config["vision_config"]["spatial_merge_size"]) ** 2
        return [int(t * h * w) // area for t, h, w in case.tensors["image_grid_thw"].tolist()]
    if len(case.image_runs) == len(case.tensors["image_sizes"]):
        return [end - start for start, end in case.image_runs]
    from transformers import LlavaNextProcessor

    processor = LlavaNextProcessor.from_pretrained(model_dir)
    sizes = [[int(h), int(w)] for h, w in case.tensors["image_sizes"].tolist()]
    counts = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    return [int(count) for count in counts]
