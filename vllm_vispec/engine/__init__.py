"""Everything that runs inside vLLM's processes: configuration, draft model, both proposers."""
