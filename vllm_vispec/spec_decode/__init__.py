"""Drafting on the V2 runner: the speculator, where images lie, the table of draft inputs."""
