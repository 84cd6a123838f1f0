"""Open one key against a suspect: `python jobs/claim.py --kit KIT --model SUSPECT --ledger URI`.

The suspect is archived and registered first. The opened key is spent: it supports nothing registered later.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from mtlsign.config import cli
from mtlsign.config.claims import ClaimSettings
from mtlsign.reports import console


def main(argv: Sequence[str]) -> None:
    """Settings → one claim in the ledger; the council's votes say what it is worth."""
    settings = cli.parse(ClaimSettings, argv, description=__doc__ or "")
    from mtlsign.claims.commands.owner import claim

    done = claim(settings)
    if settings.json_output:
        console.print_json(done)
        return
    print(f"claim {done['claim']}\n  entry {done['index']}, key {done['key']} of entry {done['publication']}")
    if not done["registration_counted"]:
        print("  the registration is not yet under a head that counts (--wait waits for it before opening)")
    if not done["marked_archived"]:
        print("  your marked model is not in the archive: without it no lineage (--marked)")


if __name__ == "__main__":
    cli.run(main)
