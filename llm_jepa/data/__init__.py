"""Moved to `llm_jepa.synthetic`."""
