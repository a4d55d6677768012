"""Draft trees beside chains and plain vLLM; see docs/trees.md."""
