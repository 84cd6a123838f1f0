"""Runs of many embeddings or many attacks."""
