"""Helpers of the engine tests: tiny models, golden cases, engine life cycle, child processes."""
