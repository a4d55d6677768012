"""A small vision-language model as the draft (Spec-LLaVA)."""
