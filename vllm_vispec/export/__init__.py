"""Writing trained heads as folders that an engine serves."""

from vllm_vispec.export.head import export_head

__all__ = ["export_head"]
