"""Frames and time."""
