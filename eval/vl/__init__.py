"""Benchmarks of VL-JEPA: ShapeStream, selective decoding, photos and real clips."""
