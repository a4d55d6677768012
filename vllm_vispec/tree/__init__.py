"""Draft trees: settings, policies that grow them, path codes, and the walk that verifies them.

Everything here is plain PyTorch with shapes that depend on settings alone, and knows no vLLM.
"""
