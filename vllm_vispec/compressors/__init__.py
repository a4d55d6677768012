"""Compressors of images for the draft: registry, primitives, gate, and where tokens stand.

Import `spec` and `places` where torch is not wanted.
"""
