"""ViSpec speculative decoding for vision-language models in vLLM."""

__version__ = "0.1.0"
