"""Planned experiments."""
