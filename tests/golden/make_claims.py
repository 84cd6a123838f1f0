"""Write `tests/golden/v0/claims.json`: statements, a ledger, heads, proofs. Run only to change the format.

All identities are PUBLISHED TEST KEYS.
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
from mtlsign.claims.commands.owner import signed_note
from mtlsign.claims.judging.admissibility import find_claim
from mtlsign.claims.judging.council import tally_votes
from tests.unit.claims.scenario import ALICE, Town, kit_of, person

OUT = Path(__file__).parent / "v0" / "claims.json"
WARNING = "PUBLISHED TEST KEYS: anybody can sign as these people. Never use any of them."


def vectors() -> dict[str, Any]:
    """Every kind of statement once, on a ledger of three members, with what a reader must find."""
    counter = iter(range(1000))
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("mtlsign.claims.owner.secrets.token_bytes", lambda n: bytes([next(counter)]) * n),
    ):
        town = Town(Path(folder), ["1", "2", "3"])
        accused = town.owner(person("accused"))
        (kit, model), (free, junk) = kit_of(ALICE), kit_of(person("bob"), head=b"a head")
        owner.register(accused, town.archive, [("base · 試験", b"clean")])
        owner.publish(town.owner(ALICE), [kit], licence="CC-BY-4.0", recipient="everybody")
        owner.publish(town.owner("bob"), [free])
        town.attest()
        entry, _ = owner.claim(town.owner(ALICE), [kit], town.archive, model + b"!", marked=model)
        owner.claim(town.owner("bob"), [free], town.archive, model + b"?", marked=junk)
        owner.exhibit(accused, town.archive, str(entry.index), b"clean")
        view = town.vote()
        rows = list(town.ledger.scan())
        size, view = len(rows), town.view()
        return {
            "WARNING": WARNING,
            "entries": [base64.b64encode(row).decode() for row in rows],
            "cosignatures": [
                {"size": head.size, "root": head.root.hex(), "line": line.line()}
                for head, line in town.ledger.cosignatures(view.origin)
            ],
            "head": signed_note(town.ledger, view).decode(),
            "inclusion": [[step.hex() for step in town.ledger.prove(i, size)] for i in range(size)],
            "consistency": {
                str(old): [step.hex() for step in town.ledger.prove_consistency(old, size)]
                for old in range(1, size)
            },
            "expected": {
                "origin": view.origin.hex(),
                "kinds": [e.statement.kind if e.statement else None for e in view.entries.values()],
                "leaves": [e.leaf.hex() for e in view.entries.values()],
                "times": [view.time(i) for i in range(size)],
                "roots": {str(n): town.ledger.head(n).root.hex() for n in range(1, size + 1)},
                "key": kit.opening.key().hex(),
                "tallies": {
                    str(e.index): tally_votes(view, e, c).counts
                    for e, c in (find_claim(view, str(i)) for i in (entry.index, entry.index + 2))
                },
                "statements": [hashlib.sha256(_payload(row)).hexdigest() for row in rows],
            },
        }


def _payload(row: bytes) -> bytes:
    return base64.b64decode(json.loads(row)["payload"])


if __name__ == "__main__":
    OUT.write_text(json.dumps(vectors(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"wrote {OUT}")
