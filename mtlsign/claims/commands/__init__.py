"""Functions behind the claim jobs."""
