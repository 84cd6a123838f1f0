"""Verify many claims at once: `python jobs/verify_batch.py --claims claims.jsonl --out results.jsonl`.

Each line is one claim, {"model": POINTER, "bundle": {…} or POINTER}; each line of the result is its verdict
or problem, in order, with the signed verdict beside it. Verifying replicas live only as long as the job.
Results are written as they come, to `results.jsonl.part`, which is renamed when all are there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from mtlsign.config import cli
from mtlsign.config.service import BatchSettings
from mtlsign.reports import console


def main(argv: Sequence[str]) -> None:
    """Settings and claims in, one result line for each out."""
    settings = BatchSettings.merged(cli.parse(BatchSettings, argv, description=__doc__ or ""))
    from mtlsign.service.batch.jsonl import ResultWriter, read_claims

    claims = read_claims(settings.claims)
    from mtlsign.distributed import serve

    with ResultWriter(settings.out) as results:
        serve.batch(settings, claims, results.add)
    found = {**results.tally, "out": str(settings.out)}
    if settings.json_output:
        console.print_json(found)
    elif not settings.quiet:
        print(
            ", ".join(f"{count} {name}" for name, count in found.items() if name != "out")
            + f" → {settings.out}"
        )


if __name__ == "__main__":
    cli.run(main)
