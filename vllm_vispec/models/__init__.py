"""The drafts as vLLM models: layers, attention, weights."""
