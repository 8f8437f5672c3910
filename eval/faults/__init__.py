"""Faults and hostile input: what is tried on the package, and what happens then."""
