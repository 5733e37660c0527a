"""Benchmarks: `python -m benchmarks.NAME` prints one JSON line last. Ratios compare within one run only."""
