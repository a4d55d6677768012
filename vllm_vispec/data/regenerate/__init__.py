"""Regeneration: the target answers the questions of a data set itself, at length."""
