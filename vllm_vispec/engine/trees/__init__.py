"""Draft trees inside vLLM: padded attention, verification of a row of nodes, both runners."""
