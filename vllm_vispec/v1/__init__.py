"""Everything that exists for the V1 runner only: deleting this folder leaves V2 as it is."""
