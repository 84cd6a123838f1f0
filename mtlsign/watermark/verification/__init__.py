"""Algorithm 1: reading a watermark from a network's tensors."""
