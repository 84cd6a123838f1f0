"""Tests of mtlsign.watermark."""
