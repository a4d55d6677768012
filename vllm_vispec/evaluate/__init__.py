"""Acceptance of a draft on recorded answers, simulated and as the engine measures it."""
