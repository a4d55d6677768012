"""A small real vision-language model, trained from scratch on two CPU cores."""
