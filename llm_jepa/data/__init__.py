"""Datasets: what the package generates itself and what it reads from disk."""
