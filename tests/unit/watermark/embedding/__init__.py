"""Tests of mtlsign.watermark.embedding."""
