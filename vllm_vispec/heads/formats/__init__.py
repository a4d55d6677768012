"""Checkpoint formats of heads: one module each, registered by `vllm_vispec.heads`."""
