"""Patch points, one module for each feature."""
