"""Fixture: a head node to which jobs are submitted, as on a cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.job_harness import Job, JobLauncher


@pytest.fixture
def head(jobs: JobLauncher) -> Iterator[tuple[Job, str, str]]:
    """Run a head node with two CPUs: (process, GCS address, dashboard URL)."""
    node, gcs, dashboard = jobs.head()
    yield node, gcs, dashboard
    node.end()
