"""Benchmarks of served targets, with and without a draft."""
