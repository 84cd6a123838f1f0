"""Tests of CSV and Parquet tables."""

from __future__ import annotations

import io

import pyarrow.parquet as pq

from mtlsign.reports import tables


def test_csv_and_parquet_keep_types_and_missing_values() -> None:
    rows = [{"a": 1, "b": True, "c": None, "d": "x,y"}, {"a": 2.5, "b": None, "d": 3}]
    assert tables.csv_of(rows, ["a", "b", "c", "d"]) == b'a,b,c,d\n1,true,,"x,y"\n2.5,,,3\n'
    read = pq.read_table(io.BytesIO(tables.parquet_of(rows, ["a", "b", "c", "d"])))
    assert read.to_pylist() == [
        {"a": 1.0, "b": True, "c": None, "d": "x,y"},
        {"a": 2.5, "b": None, "c": None, "d": "3"},
    ]
