"""Draft trees: settings, policies that grow them, their verification, and their V2 speculator.

`codes`, `grow`, `policies`, `settings` and `walk` are plain PyTorch and know no vLLM.
"""
