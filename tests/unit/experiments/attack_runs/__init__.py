"""Tests of mtlsign.experiments.attack_runs."""
