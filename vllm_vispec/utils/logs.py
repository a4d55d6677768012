"""Loggers below vLLM's own: vLLM configures the handlers and the level of ``vllm`` alone."""

import logging


def get_logger(module: str) -> logging.Logger:
    """Return the logger of one of our modules, given its ``__name__``."""
    return logging.getLogger(f"vllm.{module}")
