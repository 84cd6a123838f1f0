"""Proofs of a ledger whose stored tree was altered."""

from __future__ import annotations

import contextlib

import pytest

from mtlsign.claims import merkle
from mtlsign.claims.ledger.view import read_ledger
from mtlsign.errors import LedgerError
from tests.unit.claims.scenario import ClaimScenario
from tests.unit.claims.tampering import (
    execute_without_triggers,
)


@pytest.fixture
def scenario(small_scenario: ClaimScenario) -> ClaimScenario:
    """Council of three members."""
    return small_scenario


def test_prove_with_altered_node_is_refused_or_valid(scenario: ClaimScenario) -> None:
    for i in range(20):
        scenario.append_registration(f"m{i}")
    root = scenario.ledger.checkpoint(21).root
    for level, index in [(0, 3), (1, 0), (2, 1), (3, 0), (4, 0)]:
        (good,) = scenario.ledger.nodes(level, index, index + 1)
        execute_without_triggers(
            scenario, f"UPDATE nodes SET hash = zeroblob(32) WHERE level = {level} AND idx = {index}"
        )
        refused = 0
        for entry in range(21):
            try:
                path = scenario.ledger.prove(entry, 21)
            except LedgerError:
                refused += 1
                continue
            if (
                scenario.ledger.checkpoint(21).root == root
            ):  # otherwise the root is another one, without co-signatures
                leaf = merkle.leaf_hash(scenario.ledger.get(entry))
                assert merkle.verify_inclusion(leaf, entry, 21, path, root)
        assert refused
        for old in range(22):
            with contextlib.suppress(LedgerError):
                path = scenario.ledger.prove_consistency(old, 21)
                roots = scenario.ledger.checkpoint(old).root, scenario.ledger.checkpoint(21).root
                assert merkle.verify_consistency(old, roots[0], 21, roots[1], path)
        with pytest.raises(LedgerError):
            read_ledger(scenario.ledger)
        execute_without_triggers(
            scenario, f"UPDATE nodes SET hash = x'{good.hex()}' WHERE level = {level} AND idx = {index}"
        )
    read_ledger(scenario.ledger)
