"""Writing heads: a trained draft, or a head in another checkpoint format. Whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_vispec.heads.card import CARD_TITLE, MODEL_TITLE, guess_target, model_card, published_card
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.folder import (
    CARD,
    CONFIG,
    DRAFT_VOCAB,
    DRAFT_VOCAB_FACTS,
    DTYPES,
    PROVENANCE,
    WEIGHTS,
    HeadInfo,
    inspect_head,
    iter_canonical_tensors,
    read_json,
    weight_files,
)
from vllm_vispec.heads.formats import CANONICAL, CheckpointFormat, get_format
from vllm_vispec.heads.speculators import (
    Serving,
    locate_target,
    serving_of_folder,
    speculators_fields,
)
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import writing

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_vispec.reference.draft import Draft

_COPIED = (PROVENANCE, DRAFT_VOCAB, DRAFT_VOCAB_FACTS)
_TEXTS = {".json", ".jinja", ".txt", ".model"}
"""Suffixes of what a published model's folder holds beside weights."""
_OURS = {CONFIG, CARD, WEIGHTS, *_COPIED}


@dataclass(frozen=True)
class Export:
    """Where a trained draft goes, and what its folder says.

    Attributes:
        folder: where it will lie.
        target: the target's hub id or folder. A relative folder is stored relative to the draft's,
            so that both may move together.
        dtype: float32, float16 or bfloat16.
        num_speculative_tokens: draft tokens per step, unless the server is told otherwise.
        provenance: how the draft was made; values JSON does not know are written as text.
        overwrite: replace an empty folder or one written earlier.
    """

    folder: Path
    target: str
    dtype: str
    num_speculative_tokens: int
    provenance: Mapping[str, Any]
    overwrite: bool = False

    @property
    def serving(self) -> Serving:
        """How it is to be served."""
        return Serving(self.target, self.num_speculative_tokens)


def export_head(draft: Draft, to: Export) -> HeadInfo:
    """Write a trained draft of any kind as a canonical folder that `vllm serve` takes.

    It holds model.safetensors, config.json (explicit flags, and the speculators format's fields,
    by which `vllm serve FOLDER` finds the target), provenance.json and a model card, README.md.

    Returns:
        What `inspect_head` says about the folder written.

    Raises:
        ViSpecError: the folder is taken or cannot be written, or the target is a path to nothing.
    """
    destination = Path(to.folder).expanduser().absolute()
    content = draft.config.to_config_json(to.dtype)
    content |= speculators_fields(draft.config, to.serving, destination)
    card = model_card(
        draft.config, to.dtype, to.serving, to.folder, "trained", to.provenance, names_target=True
    )
    with new_head_folder(destination, overwrite=to.overwrite) as scratch:
        write_json(scratch / PROVENANCE, to.provenance)
        _write_head(scratch, draft.state_dict().items(), to.dtype, content, card)
    return inspect_head(destination)


def export_model(model: Any, source: Path, to: Export) -> None:
    """Write a trained model of Hugging Face's as an ordinary folder of its kind.

    Its weights have the names they were published under. Configuration, tokenizer and processor are
    the published files; only the dtype in config.json is the new one.

    Args:
        model: as it was loaded from `source`, in a dtype that is changed here.
        source: the published folder.

    Raises:
        ViSpecError: the folder is taken or cannot be written.
    """
    import torch
    from transformers import GenerationConfig

    destination = Path(to.folder).expanduser().absolute()
    model.to(getattr(torch, to.dtype))
    # The published one is copied. This one passes every check of transformers.
    model.generation_config = GenerationConfig()
    with new_head_folder(destination, overwrite=to.overwrite, check=weight_files) as scratch:
        model.save_pretrained(scratch)
        for file in sorted(source.iterdir()):
            if file.suffix in _TEXTS and not file.name.endswith(".safetensors.index.json"):
                shutil.copyfile(file, scratch / file.name)
        write_json(scratch / CONFIG, _with_dtype(read_json(source / CONFIG), to.dtype))
        write_json(scratch / PROVENANCE, to.provenance)
        card = published_card(to.dtype, to.serving, to.folder, to.provenance)
        (scratch / CARD).write_text(card, encoding="utf-8")


def _with_dtype(content: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a model's config.json with another dtype wherever it states one."""
    found = {}
    for name, value in content.items():
        is_dtype = name in ("dtype", "torch_dtype") and isinstance(value, str)
        value = _with_dtype(value, dtype) if isinstance(value, dict) else value
        found[name] = dtype if is_dtype else value
    return found


def convert_head(
    source: str | Path,
    destination: str | Path,
    *,
    checkpoint_format: str = CANONICAL.name,
    source_format: str | None = None,
    dtype: str | None = None,
    target: str | None = None,
    drop_embed_tokens: bool = False,
    overwrite: bool = False,
) -> HeadInfo:
    """Write a head of any checkpoint format in another one.

    Args:
        source: folder or hub id.
        checkpoint_format: canonical, or a published one, to use a head with its authors' tools.
        source_format: the source's, if it is one of `formats.NAMED_FORMATS`.
        dtype: float32, float16 or bfloat16; None keeps the stored one.
        target: hub id or folder. Named in the model card and, in a canonical folder, in
            config.json, so that `vllm serve FOLDER` finds it. None: the one the source names; the
            card of a source that names none has a guess from the head's sizes.
        drop_embed_tokens: leave the embedding table out, vLLM then uses the target's.
        overwrite: replace an empty folder or one written here.

    Returns:
        What `inspect_head` says about the folder written.

    Raises:
        ViSpecError: the source is no usable head, the format cannot express it, or the
            destination is taken.
    """
    possible = dict.fromkeys(DTYPES.values())
    if dtype is not None and dtype not in possible:
        raise ViSpecError(f"--dtype {dtype!r} is not supported: use one of {', '.join(possible)}")
    writer = get_format(checkpoint_format)
    info = inspect_head(source, checkpoint_format=source_format)
    check = partial(inspect_head, checkpoint_format=writer.name if writer.is_named else None)
    folder = Path(destination).expanduser().absolute()
    config, shapes = info.config, info.shapes
    if drop_embed_tokens:
        config = replace(config, has_embed_tokens=False)
        shapes.pop("embed_tokens.weight", None)
    dtype = dtype or DTYPES[info.dtype]
    content = writer.write_checked_config(config, dtype, shapes)
    serving = _serving(info, target)
    names_target = serving is not None and writer is CANONICAL
    if writer is CANONICAL:
        content["vispec"]["source_format"] = info.checkpoint_format
        if serving is not None:
            content |= speculators_fields(config, serving, folder)
    found = info.folder / PROVENANCE
    card = model_card(
        config,
        dtype,
        serving or Serving(guess_target(config)),
        # No path of this machine that the user did not write.
        destination,
        f"converted from the {info.checkpoint_format} format",
        json.loads(found.read_text(encoding="utf-8")) if found.is_file() else None,
        names_target=names_target,
    )
    with new_head_folder(folder, overwrite=overwrite, source=info.folder, check=check) as scratch:
        for name in _COPIED:
            if (info.folder / name).is_file():
                shutil.copyfile(info.folder / name, scratch / name)
        _write_head(scratch, _tensors(info, config, writer), dtype, content, card)
    return check(folder)


@contextmanager
def new_head_folder(
    destination: Path,
    *,
    overwrite: bool,
    source: Path | None = None,
    check: Callable[[Path], Any] = inspect_head,
) -> Iterator[Path]:
    """Yield an empty folder beside `destination`; put it in place if the body succeeds.

    What was written must load, else it is thrown away and nothing has changed.

    Args:
        destination: absolute path of the folder to appear.
        overwrite: replace an empty folder or one that this module wrote.
        source: a folder that must not be the destination.
        check: raises if what was written would not load.

    Raises:
        ViSpecError: the destination is taken, cannot be written, or what was written is no head.
    """
    _check_destination(destination, overwrite, source)
    old = destination.with_name(f".{destination.name}.old")
    try:
        with writing(destination) as scratch:
            scratch.mkdir()
            yield scratch
            check(scratch)  # never put a folder in place that would not load
            if destination.exists():
                # Moved aside first, so that a crash loses nothing.
                shutil.rmtree(old, ignore_errors=True)
                destination.rename(old)
    finally:
        if not destination.exists() and old.exists():
            old.rename(destination)
        shutil.rmtree(old, ignore_errors=True)


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: str) -> None:
    """Write tensors as one safetensors file in `dtype`, on whatever device they are."""
    import torch
    from safetensors.torch import save_file

    torch_dtype = getattr(torch, dtype)
    stored = {
        name: tensor.detach().to(device="cpu", dtype=torch_dtype).contiguous()
        for name, tensor in tensors
    }
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON; values JSON does not know become strings."""
    text = json.dumps(content, indent=2, default=str, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _write_head(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: str,
    content: Mapping[str, Any],
    card: str,
) -> None:
    write_weights(folder, tensors, dtype)
    write_json(folder / CONFIG, content)
    (folder / CARD).write_text(card, encoding="utf-8")


def _check_destination(destination: Path, overwrite: bool, source: Path | None) -> None:
    if not destination.exists():
        return
    if source is not None and destination.resolve() == source.resolve():
        raise ViSpecError(f"destination {destination} is the source: choose another folder")
    if not overwrite:
        raise ViSpecError(f"destination {destination} exists: choose another or add --overwrite")
    # --overwrite deletes the folder, so it must look like one that we wrote.
    if not destination.is_dir():
        raise ViSpecError(f"destination {destination} is a file: choose a folder")
    if any(destination.iterdir()) and not _is_ours(destination):
        raise ViSpecError(
            f"destination {destination} is no head that vispec wrote, --overwrite would delete "
            "its files: choose another folder"
        )


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds our card or a canonical config."""
    try:
        if "vispec" in json.loads((folder / CONFIG).read_text(encoding="utf-8")):
            return True
        names = {path.name for path in folder.iterdir()}
        card = (folder / CARD).read_text(encoding="utf-8")
        if card.startswith(MODEL_TITLE):
            return {Path(name).suffix for name in names} <= {*_TEXTS, ".md", ".safetensors"}
        return names <= _OURS and card.startswith(CARD_TITLE)
    except (OSError, ValueError, TypeError):
        return False


def _tensors(
    info: HeadInfo, config: HeadConfig, writer: CheckpointFormat
) -> Iterator[tuple[str, Tensor]]:
    """A head's tensors under the writer's names, without an embedding table to be dropped."""
    for name, tensor in iter_canonical_tensors(info):
        if config.has_embed_tokens or name != "embed_tokens.weight":
            yield writer.source_name(name), tensor


def _serving(info: HeadInfo, target: str | None) -> Serving | None:
    """The target that was given, else the one the source names."""
    stated = serving_of_folder(info.folder)
    if target is not None:
        return replace(stated, target=target) if stated else Serving(target)
    return stated and replace(stated, target=locate_target(stated.target, info.folder))
