"""Errors, files that appear whole or not at all, one-line ends of commands."""
