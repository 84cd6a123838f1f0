"""The watermarking scheme: keys, carriers, verification and embedding."""
