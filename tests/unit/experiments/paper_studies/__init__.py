"""Tests of mtlsign.experiments.paper_studies."""
