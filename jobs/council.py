"""One member of the council: `python jobs/council.py --identity FILE --ledger URI [--once]`.

A round checks the whole ledger, co-signs its heads, verifies each new claim and appends this member's vote.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from mtlsign.config import cli
from mtlsign.config.claims import CouncilSettings
from mtlsign.reports import console


def main(argv: Sequence[str]) -> None:
    """Settings → rounds. A ledger that is not what this member saw is an error, and nothing is signed."""
    settings = cli.parse(CouncilSettings, argv, description=__doc__ or "")
    from mtlsign.claims.commands.owner import council

    def show(done: dict[str, Any]) -> None:
        if settings.json_output:
            console.print_json(done)
            return
        for vote in done["votes"]:
            print(
                f"claim {vote['claim']}: {vote['status']} ({vote['matches']} of {vote['n']}) {vote['reason']}"
            )
        for remark in done["remarks"]:
            print(f"remark: {remark}")
        if "failed" in done:
            print(f"round failed, nothing was signed: {done['failed']}", flush=True)
            return
        print(f"head of {done['head']['entries']} entries, co-signed {done['cosigned']}", flush=True)

    council(settings, show=show)


if __name__ == "__main__":
    cli.run(main)
