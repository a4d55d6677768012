"""Acceptance of a head on recorded answers, simulated and as the engine measures it."""
