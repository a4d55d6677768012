"""The `vispec` command."""
