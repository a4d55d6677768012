"""Speed measurements; each prints both sides of one run and writes JSON."""
