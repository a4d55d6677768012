"""A VLM whose language model is a published one: SmolLM2-135M-Instruct under a trained tower."""
