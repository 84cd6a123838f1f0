"""Rendering of plain dictionaries: HTML, SVG, CSV, Parquet and terminal output."""
