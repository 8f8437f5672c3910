"""The committed experiments: each one trains its arms, judges them, and writes one result file for each run."""
