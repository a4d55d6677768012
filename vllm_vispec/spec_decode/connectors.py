"""Prompts that reach an engine through a KV connector: prefilled elsewhere, or kept elsewhere.

Their keys and values arrive, the draft's among them, but the vision tower does not run for them.
So the text behind an image that this engine has not seen is drafted without the image.  What is
answered does not change; fewer drafts are accepted.
"""

from typing import Any

from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

RAISE_TABLE = "Raise `image_table_size` in the speculative config."
PREFILL_HERE = (
    "Their tokens came through the KV connector {connector}, so the vision tower did not run for "
    "them in this engine: let requests with images be prefilled by the engine that decodes them."
)


def receiving_connector(kv_transfer: Any) -> str | None:
    """Return the name of the connector that may bring prompts, None if none may.

    Args:
        kv_transfer: vLLM's ``KVTransferConfig``; None without a connector.
    """
    if kv_transfer is None or not kv_transfer.is_kv_consumer:
        return None
    connector: str = kv_transfer.kv_connector
    return connector


def note_connector(connector: str) -> None:
    """Say once, when an engine starts, what a connector means for drafts."""
    logger.info(
        "ViSpec: the KV connector %s brings prompts without the features of their images; text "
        "behind an image that this engine has not seen is drafted without it. Output stays the "
        "same, acceptance is lower.",
        connector,
    )


def remedy_for_missing(connector: str | None, *, has_room: bool) -> str:
    """Return what to do about images whose features are not at hand.

    Args:
        connector: See `receiving_connector`.
        has_room: Whether the table of images has free slots; its size is not to blame then.
    """
    if connector is None:
        return RAISE_TABLE
    elsewhere = PREFILL_HERE.format(connector=connector)
    if has_room:
        return elsewhere
    return f"{elsewhere} If it did prefill them, the table was too small: {RAISE_TABLE}"
