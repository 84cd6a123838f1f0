"""Fetching of suspect models from allowed locations."""
