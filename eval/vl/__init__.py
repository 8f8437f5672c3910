"""VL-JEPA measured."""
