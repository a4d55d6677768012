"""Where a round's time goes: vLLM's own EAGLE and ViSpec, part by part, side by side."""
