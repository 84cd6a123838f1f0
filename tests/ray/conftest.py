"""A head node that jobs are submitted to, as on a cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.job_harness import Job, Jobs


@pytest.fixture
def head(jobs: Jobs) -> Iterator[tuple[Job, str, str]]:
    """A head node with two CPUs: (process, GCS address, dashboard URL)."""
    node, gcs, dashboard = jobs.head()
    yield node, gcs, dashboard
    node.end()
