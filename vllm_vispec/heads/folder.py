"""Writing a head's folder: whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from vllm_vispec.draft_vocab.files import DRAFT_VOCAB, DRAFT_VOCAB_FACTS
from vllm_vispec.heads.load import inspect_head
from vllm_vispec.utils.errors import ViSpecError

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("float32", "float16", "bfloat16")
CONFIG, CARD, PROVENANCE, WEIGHTS = (
    "config.json",
    "README.md",
    "provenance.json",
    "model.safetensors",
)
_OURS = {CONFIG, CARD, PROVENANCE, WEIGHTS, DRAFT_VOCAB, DRAFT_VOCAB_FACTS}
CARD_TITLE = "# ViSpec head"


def check_dtype(name: str, setting: str = "dtype") -> None:
    """Refuse a dtype heads are not stored in.

    Raises:
        ViSpecError: names the setting and what is possible.
    """
    if name not in DTYPES:
        raise ViSpecError(f"{setting} {name!r} is not supported: use one of {', '.join(DTYPES)}")


@contextmanager
def new_head_folder(
    destination: Path, *, overwrite: bool, source: Path | None = None
) -> Iterator[Path]:
    """Yield an empty folder beside `destination`; put it in place if the body succeeds.

    What was written must load, else it is thrown away and nothing has changed.

    Args:
        destination: absolute path of the folder to appear.
        overwrite: replace an empty folder or one that this module wrote.
        source: a folder that must not be the destination.

    Raises:
        ViSpecError: the destination is taken, cannot be written, or what was written is no head.
    """
    _check_destination(destination, overwrite, source)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    except OSError as error:
        raise _cannot_write(destination, error) from error
    try:
        yield scratch
        inspect_head(scratch)  # never put a folder in place that would not load
        # Temporary folders are private; servers often run as another user.
        scratch.chmod(0o755)
        _swap_in(scratch, destination)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(destination, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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


def _cannot_write(destination: Path, error: Exception) -> ViSpecError:
    return ViSpecError(
        f"{destination} cannot be written ({error}): free space there or choose another folder"
    )


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
        return names <= _OURS and card.startswith(CARD_TITLE)
    except (OSError, ValueError, TypeError):
        return False


def _swap_in(scratch: Path, destination: Path) -> None:
    """Rename, moving an old folder aside first so that a crash loses nothing."""
    if not destination.exists():
        scratch.rename(destination)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old.", dir=destination.parent))
    destination.rename(old / destination.name)
    try:
        scratch.rename(destination)
    except OSError:
        (old / destination.name).rename(destination)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
