"""Commit to a marked model before it leaves: `jobs/publish.py --kit KIT --model MODEL --ledger URI`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from mtlsign.config import cli
from mtlsign.config.claims import PublishSettings
from mtlsign.reports import console


def main(argv: Sequence[str]) -> None:
    """Settings → one entry of the ledger. Give the model away only when `counted` is true."""
    settings = cli.parse(PublishSettings, argv, description=__doc__ or "")
    from mtlsign.claims.commands.owner import publish

    done = publish(settings)
    if settings.json_output:
        console.print_json(done)
        return
    print(f"published as entry {done['index']} of {settings.ledger}")
    if not done["counted"]:
        print("  not yet under a head that counts: keep the model until enough of the council co-signed")
    elif done["self_attested"]:
        print("  attested by nobody but you: others must co-sign before this says when it was")
    print(done["head"]["note"])


if __name__ == "__main__":
    cli.run(main)
