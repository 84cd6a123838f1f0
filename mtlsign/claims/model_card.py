"""A block for a model card: where a release was committed, and how anybody checks that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BEGIN, END = "<!-- mtlsign {}: begin -->", "<!-- mtlsign {}: end -->"
PROVENANCE, CLAIM = "provenance", "claim"


def provenance_block(done: Mapping[str, Any]) -> str:
    """Markdown from the result of `commands.publish`. It reveals nothing about the key."""
    head = done["head"]
    lines = [
        "## Provenance",
        "",
        f"This model (SHA-256 `{done['model_digest']}`) was committed before it was released, as entry "
        f"{done['index']} of the ledger `{head['origin']}`.",
        "",
        "| | |",
        "|---|---|",
        f"| entry | `{done['id']}` |",
        f"| head | {head['size']} entries, root `{head['root']}` |",
        f"| co-signed by | {len(head['cosigned'])} of the council |",
        "",
        f"Check it: `python jobs/ledger.py prove --ledger LEDGER --index {done['index']}`",
    ]
    return _block(PROVENANCE, lines)


def claim_block(done: Mapping[str, Any]) -> str:
    """Markdown from the result of an offline check (`bundle.to_json`)."""
    lines = [
        "## Ownership claim",
        "",
        f"**{done['standing']}** — {done['sentence']}",
        "",
        "| | |",
        "|---|---|",
        f"| accused model | `{done['suspect']}` |",
        f"| claim | `{done['claim']}` |",
        f"| ledger | `{done['ledger']}`, head of {done['head']['size']} entries |",
        f"| votes | {', '.join(f'{n} {s}' for s, n in done['numbers']['votes'].items()) or 'none yet'} |",
        "",
        "Check it: `python jobs/verify.py --bundle claim.zip --head head.txt`",
    ]
    return _block(CLAIM, lines)


def _block(kind: str, lines: list[str]) -> str:
    return "\n".join([BEGIN.format(kind), *lines, END.format(kind), ""])


def insert_block(card: str, block: str) -> str:
    """The card with the block, in place of an earlier one of its kind or at the end."""
    kind = next(kind for kind in (PROVENANCE, CLAIM) if block.startswith(BEGIN.format(kind)))
    before, mark, rest = card.partition(BEGIN.format(kind))
    if mark and END.format(kind) in rest:
        return before + block + rest.partition(END.format(kind))[2].removeprefix("\n")
    return card.rstrip("\n") + "\n\n" + block if card.strip() else block
