"""What `vispec verify` finds out: whether a head works on this machine, and how well."""
