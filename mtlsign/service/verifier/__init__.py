"""Verification of one claim within time and memory limits."""
