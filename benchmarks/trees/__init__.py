"""Draft trees beside chains and plain vLLM; see docs/evidence/trees.md."""
