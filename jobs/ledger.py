"""Look after a ledger: `python jobs/ledger.py ACTION --ledger URI`.

found makes one; head shows (and with --out keeps) the newest head that counts; prove --index N gives an
entry with its proof; check recomputes everything, with --head FILE also against a head that you kept; list
shows all entries; members proposes or signs another council; exhibit answers a claim; bundle packs one for
an offline check.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from mtlsign.config import cli
from mtlsign.config.claims import LedgerJobSettings
from mtlsign.errors import SettingsError
from mtlsign.reports import console


def main(argv: Sequence[str]) -> None:
    """Action and settings → one call. A ledger that is not what it was is an error (exit code 2)."""
    from mtlsign.claims.commands.ledger import ACTIONS

    action = argv[0] if argv and not argv[0].startswith("-") else ""
    settings = cli.parse(LedgerJobSettings, argv[bool(action) :], description=__doc__ or "")
    if action not in ACTIONS:
        raise SettingsError(f"comes first, one of {', '.join(ACTIONS)}", field="action")
    done = ACTIONS[action](settings)
    if settings.json_output:
        console.print_json(done)
    elif action == "list":
        for entry in done["entries"]:
            print(
                entry["index"],
                entry["id"][:16],
                entry["kind"] or entry["problem"],
                entry["time"] or "pending",
            )
    else:
        note = done.get("note") or done.get("head", {}).get("note")
        print(note or console.table([(name, str(value)) for name, value in done.items()]))


if __name__ == "__main__":
    cli.run(main)
