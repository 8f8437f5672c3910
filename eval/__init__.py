"""Benchmarks: a client of `llm_jepa`, like a user's project. Imports public names only; the package never imports it."""
