"""Training of ViSpec heads on the frozen target's hidden states."""
