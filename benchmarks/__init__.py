"""Ratios of costs; see `benchmarks/README.md`."""
