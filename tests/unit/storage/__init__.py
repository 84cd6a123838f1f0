"""Tests of mtlsign.storage."""
