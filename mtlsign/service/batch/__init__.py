"""Verification of a file of claims without a server."""
