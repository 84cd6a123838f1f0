"""Blocks for a model card: commitment of a release, result of a claim, and commands to check them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

BEGIN, END = "<!-- mtlsign {}: begin -->", "<!-- mtlsign {}: end -->"
_MARKUP = frozenset("<>&`*_[]|\\~#!")
PROVENANCE, CLAIM = "provenance", "claim"


def provenance_block(result: Mapping[str, Any]) -> str:
    """Return the Markdown block for a result of `commands.owner.publish`. It reveals no key."""
    checkpoint = result["head"]
    lines = [
        "## Provenance",
        "",
        f"This model (SHA-256 `{result['model_digest']}`) was committed before it was released, as entry "
        f"{result['index']} of the ledger `{checkpoint['origin']}`.",
        "",
        "| | |",
        "|---|---|",
        f"| entry | `{result['id']}` |",
        f"| checkpoint | {checkpoint['size']} entries, root `{checkpoint['root']}` |",
        f"| co-signed by | {len(checkpoint['cosigned'])} of the council |",
        "",
        f"Check it: `python jobs/ledger.py prove --ledger LEDGER --index {result['index']}`",
    ]
    return _block(PROVENANCE, lines)


def claim_block(result: Mapping[str, Any]) -> str:
    """Return the Markdown block for the result of an offline check (`bundle_result.to_json`)."""
    counted = Counter(vote["status"] for vote in result["votes"] if vote["counts"])
    votes = ", ".join(f"{count} {status}" for status, count in counted.items())
    lines = [
        "## Ownership claim",
        "",
        f"**{result['standing']}** — {escape(result['sentence'])}",
        "",
        "| | |",
        "|---|---|",
        f"| accused model | `{result['suspect']}` |",
        f"| claim | `{result['claim']}` |",
        f"| ledger | `{result['ledger']}`, checkpoint of {result['head']['size']} entries |",
        f"| votes | {votes or 'none yet'} |",
        "",
        escape(result["caveat"]),
        "",
        "Check it: `python jobs/verify.py --bundle claim.zip --head head.txt`",
    ]
    return _block(CLAIM, lines)


def escape(text: str) -> str:
    """Return text as a single line that has no effect as Markdown or HTML."""
    line = " ".join(text.split())
    return "".join(f"&#{ord(char)};" if char in _MARKUP else char for char in line)


def _block(kind: str, lines: list[str]) -> str:
    return "\n".join([BEGIN.format(kind), *lines, END.format(kind), ""])


def insert_block(card: str, block: str) -> str:
    """Return the card with the block, in place of an earlier block of its kind or at the end."""
    kind = next(kind for kind in (PROVENANCE, CLAIM) if block.startswith(BEGIN.format(kind)))
    before, mark, rest = card.partition(BEGIN.format(kind))
    if mark and END.format(kind) in rest:
        return before + block + rest.partition(END.format(kind))[2].removeprefix("\n")
    return card.rstrip("\n") + "\n\n" + block if card.strip() else block
