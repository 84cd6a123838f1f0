"""Fixtures: a head node to which jobs are submitted, and one process for jobs that may share a cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.job_harness import Job, JobLauncher
from tests.helpers.job_session import JobSession


@pytest.fixture
def head(jobs: JobLauncher) -> Iterator[tuple[Job, str, str]]:
    """Run a head node with two CPUs: (process, GCS address, dashboard URL)."""
    node, gcs, dashboard = jobs.head()
    yield node, gcs, dashboard
    node.end()


@pytest.fixture(scope="package")
def session(jobs: JobLauncher) -> Iterator[JobSession]:
    """Run a process for several jobs, with one cluster of two CPUs that the first job on Ray starts."""
    with jobs.session() as session:
        yield session
