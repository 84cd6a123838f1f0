"""Tests of mtlsign.experiments.sweeps."""
