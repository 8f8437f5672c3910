"""Benchmarks: a client of `llm_jepa`, like a user's project. The package never imports it."""
