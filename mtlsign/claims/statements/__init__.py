"""Signed statements: types, parser, envelopes and commitments."""
