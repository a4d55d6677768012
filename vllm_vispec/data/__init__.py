"""Image conversations: read from files, rendered by the target's template, turned into tokens."""
