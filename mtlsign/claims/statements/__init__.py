"""Signed statements: types, parsing, envelopes and commitments."""
