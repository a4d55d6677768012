"""A published model of the target's family as the draft, as it is: docs/draft-model.md."""
