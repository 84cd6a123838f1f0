"""Phase 1, phase 2 and their results."""
