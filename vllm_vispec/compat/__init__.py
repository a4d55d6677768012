"""Where ViSpec touches vLLM: patch points by feature, their check, and what patches."""
