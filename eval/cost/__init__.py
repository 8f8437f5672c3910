"""What a step, a token and a window cost."""
