"""Carriers turn a key's integers into elements of the data space: `qr` draws images (design decision 1)."""
