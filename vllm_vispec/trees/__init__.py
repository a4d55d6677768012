"""Draft trees: settings, policies that grow them, their verification, and their V2 speculator.

`codes`, `grow`, `policies`, `settings`, `target_cache` and `verify` are plain PyTorch.
"""
