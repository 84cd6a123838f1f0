"""Problem documents."""

from __future__ import annotations

import logging

import pytest

from mtlsign.errors import LedgerError, StorageError
from mtlsign.service.problems import Problem, problem_from_error


def test_problem_pickled_and_restored_is_equal() -> None:
    import pickle

    problem = pickle.loads(pickle.dumps(Problem("busy", "later", retry_after=3, more=1)))
    assert problem.document()["more"] == 1 and problem.retry_after == 3 and problem.status == 503


def test_problem_document_with_lone_surrogate_is_encodable() -> None:
    assert Problem("internal", "about \ud800").document()["detail"] == "about ?"


def test_problem_from_error_hides_internal_addresses(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    internal = "http://10.1.2.3:8333 refused, set AWS_SECRET_ACCESS_KEY or look at /srv/ledger.db"
    for error in (StorageError(internal), LedgerError(internal)):
        for about in ("model", "bundle", "ledger"):
            problem = problem_from_error(error, about=about)
            assert problem.kind in ("unreachable", "ledger") and "10.1" not in problem.detail
            assert "AWS" not in problem.detail and "/srv" not in problem.detail
    assert internal in caplog.text
