"""Architectures, checkpoints and taps: networks that the package can build and read."""
