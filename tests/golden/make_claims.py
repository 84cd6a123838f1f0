"""Generator of `tests/golden/v1/claims.json`: statements, a ledger, checkpoints and proofs.

Run it only to change the format. All identities are PUBLISHED TEST KEYS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from mtlsign.claims import owner
from mtlsign.claims.commands.settings import signed_note
from mtlsign.claims.judging.admissibility import find_claim
from mtlsign.claims.judging.council import tally_votes
from tests.unit.claims.scenario import ALICE, ClaimScenario, kit_and_model, make_identity

OUT = Path(__file__).parent / "v1" / "claims.json"


def vectors() -> dict[str, Any]:
    """Return every kind of statement on a ledger of three members, with the results of a reader."""
    counter = iter(range(1000))
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("mtlsign.claims.owner.secrets.token_bytes", lambda n: bytes([next(counter)]) * n),
    ):
        scenario = ClaimScenario(Path(folder), ["1", "2", "3"])
        ledger, archive = scenario.ledger, scenario.archive
        accused, bob = scenario.owner(make_identity("accused")), scenario.owner("bob")
        (kit, model), (trained_kit, junk) = kit_and_model(ALICE), kit_and_model(bob.identity, head=b"a head")
        owner.register(accused, archive, [("base · 試験", b"clean")])
        owner.publish(scenario.owner(ALICE), [kit], licence="CC-BY-4.0", recipient="everybody")
        owner.publish(bob, [trained_kit])
        scenario.cosign_all()
        entry, _ = owner.claim(scenario.owner(ALICE), [kit], archive, model + b"!", own_model=model)
        owner.claim(scenario.owner("bob"), [trained_kit], archive, model + b"?", own_model=junk)
        owner.exhibit(accused, archive, str(entry.index), b"clean")
        scenario.run_council()
        rows = list(ledger.scan())
        size, view = len(rows), scenario.view()
        claims = [find_claim(view, str(index)) for index in (entry.index, entry.index + 2)]
        return {
            # The warning stands in the published file and must not change.
            "WARNING": json.loads(OUT.read_text("utf-8"))["WARNING"],
            "entries": [base64.b64encode(row).decode() for row in rows],
            "cosignatures": [
                {"size": checkpoint.size, "root": checkpoint.root.hex(), "line": line.to_line()}
                for checkpoint, line in ledger.cosignatures(view.origin)
            ],
            "head": signed_note(ledger, view).decode(),
            "inclusion": [[step.hex() for step in ledger.prove(i, size)] for i in range(size)],
            "consistency": {
                str(old): [step.hex() for step in ledger.prove_consistency(old, size)]
                for old in range(1, size)
            },
            "expected": {
                "origin": view.origin.hex(),
                "kinds": [e.statement.kind if e.statement else None for e in view.entries.values()],
                "leaves": [e.leaf.hex() for e in view.entries.values()],
                "times": [view.time(i) for i in range(size)],
                "roots": {str(n): ledger.checkpoint(n).root.hex() for n in range(1, size + 1)},
                "key": kit.opening.key().hex(),
                "tallies": {
                    str(claim_entry.index): tally_votes(view, claim_entry, claim).counts
                    for claim_entry, claim in claims
                },
                "statements": [hashlib.sha256(_payload(row)).hexdigest() for row in rows],
            },
        }


def serialize(content: dict[str, Any]) -> str:
    """Return the text of the golden file."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _payload(row: bytes) -> bytes:
    return base64.b64decode(json.loads(row)["payload"])


if __name__ == "__main__":
    OUT.write_text(serialize(vectors()), "utf-8")
    print(f"wrote {OUT}")
