"""The durable queue of verification requests."""
