"""Benchmarks of cost: a training step, decoding, and VL-JEPA training and streams."""
