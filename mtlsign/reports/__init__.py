"""Rendering of plain dictionaries: HTML pages, SVG figures, CSV and Parquet tables, terminal output."""
