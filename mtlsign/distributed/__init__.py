"""The only rooms that import ray: training over many workers, sweeps, the service."""
