"""`make demo`: the tiny VLM answers held-out images with plain vLLM and with ViSpec."""
