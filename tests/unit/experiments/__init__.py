"""Tests of mtlsign.experiments."""
