"""Attack runs: many attacks on one marked model."""
