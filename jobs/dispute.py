"""Who descends from whom: `python jobs/dispute.py --ledger URI --claims ID[,ID…]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from mtlsign.config import cli
from mtlsign.config.claims import DisputeSettings
from mtlsign.reports import console


def main(argv: Sequence[str]) -> None:
    """Settings → matrix, edges and a standing for each claim."""
    settings = cli.parse(DisputeSettings, argv, description=__doc__ or "")
    from mtlsign.claims.commands.owner import resolve_dispute_job

    done = resolve_dispute_job(settings)
    if settings.json_output:
        console.print_json(done.to_json())
        return
    for claim, row in done.matrix.items():
        for model, found in row.items():
            print(
                f"key of {claim[:16]} on model {model[:16]}: {found.status}, {found.evidence_bits:.1f} bits"
            )
    for edge in done.edges:
        arrow = f"{edge.ancestor[:16]} -> {edge.descendant[:16]}" if edge.ancestor and edge.descendant else ""
        print(f"{edge.kind} {arrow}: {edge.reason}")
    for standing in done.standings:
        print(f"{standing.claim[:16]}: {standing.standing}\n  {standing.sentence}")


if __name__ == "__main__":
    cli.run(main)
