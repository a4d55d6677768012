"""A head in a repository of a model hub, with a card that names it there."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_vispec.heads.card import model_card
from vllm_vispec.heads.folder import (
    CARD,
    CONFIG,
    DRAFT_VOCAB,
    DRAFT_VOCAB_FACTS,
    DTYPES,
    PROVENANCE,
    inspect_head,
    is_vispec_head,
)
from vllm_vispec.heads.formats import CANONICAL
from vllm_vispec.heads.location import is_hub_id
from vllm_vispec.heads.speculators import serving_of_folder
from vllm_vispec.utils.errors import ViSpecError, first_line

_SENT = (CONFIG, PROVENANCE, DRAFT_VOCAB, DRAFT_VOCAB_FACTS)


def push_head(folder: Path, repo: str, *, private: bool = False) -> str:
    """Send a canonical head to a hub in one commit; makes the repository if there is none.

    Only what belongs to a head is sent. Its card is written anew: commands name the repository, and
    the hub reads from it which target the head belongs to.

    Args:
        repo: like "org/name".
        private: of a new repository.

    Returns:
        Where the commit is.

    Raises:
        ViSpecError: the folder is no canonical head that names its target by a hub id, or the hub
            refuses it.
    """
    if not is_hub_id(repo):
        raise ViSpecError(f"repository {repo!r} is no hub id: give one like org/name")
    if not folder.is_dir():
        raise ViSpecError(f"head folder {str(folder)!r} does not exist: give a local folder")
    if (folder / CONFIG).is_file() and not is_vispec_head(folder):
        raise ViSpecError(f"{folder} is no head: send other models by `hf upload {repo} {folder}`")
    info = inspect_head(folder)
    serving = serving_of_folder(folder)
    if info.checkpoint_format != CANONICAL.name or serving is None or not is_hub_id(serving.target):
        raise ViSpecError(
            f"head {folder} does not name its target by a hub id, so nobody else could serve it: "
            f"write one that does by `vispec convert {folder} NEW --target ORG/NAME`, push that"
        )
    found = folder / PROVENANCE
    card = model_card(
        info.config,
        DTYPES[info.dtype],
        serving,
        repo,
        "trained" if found.is_file() else "converted",
        json.loads(found.read_text(encoding="utf-8")) if found.is_file() else None,
        names_target=True,
    )
    from huggingface_hub import CommitOperationAdd, HfApi

    sent = [folder / name for name in _SENT if (folder / name).is_file()] + [*info.files]
    operations = [CommitOperationAdd(file.name, str(file)) for file in sent]
    operations.append(CommitOperationAdd(CARD, (_metadata(serving.target) + card).encode()))
    hub = HfApi()
    # The hub client raises errors of several families, which differ between its versions.
    try:
        hub.create_repo(repo, private=private or None, exist_ok=True)
        done = hub.create_commit(repo, operations, commit_message="Head, by vispec push")
    except Exception as error:
        raise ViSpecError(
            f"the hub does not take {repo} ({first_line(error)}): check the name, your network and "
            "token (hf auth login)"
        ) from error
    return str(done.commit_url)


def _metadata(target: str) -> str:
    """What the hub reads at the top of a card."""
    tags = "".join(f"\n- {tag}" for tag in ("speculative-decoding", "vllm", "vllm-vispec"))
    return f"---\nlibrary_name: vllm\nbase_model: {target}\ntags:{tags}\n---\n\n"
