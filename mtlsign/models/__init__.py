"""Networks that the package can build and read: architectures, checkpoints, taps, channel groups."""
