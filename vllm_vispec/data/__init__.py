"""Image conversations: read from files, rendered by the target's template, turned into tokens."""

from vllm_vispec.data.types import Conversation, Part, Rejected, Turn

__all__ = ["Conversation", "Part", "Rejected", "Turn"]
