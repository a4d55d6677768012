"""How many draft tokens a step has: by load and acceptance, and by what a request asks for."""
