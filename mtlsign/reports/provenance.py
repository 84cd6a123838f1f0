"""Origin of a report: date, run, program, policy, public key, and the command that checks it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from mtlsign.reports.formatting import number, words


def provenance(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the table; a value that the result lacks has none.

    Args:
        result: content of `result.json` with the fields `created`, `run`, `mtlsign` (version),
            `bits_required`, `public_key` and `command`.
    """
    bits = number(result.get("bits_required"))
    rows = [
        ("Date (UTC)", result.get("created")),
        ("Run", result.get("run")),
        ("Program", None if result.get("mtlsign") is None else f"mtlsign {result['mtlsign']}"),
        ("Policy", None if bits is None else f"a claim is accepted from {bits:g} bits of evidence"),
        ("Public key of the owner", result.get("public_key")),
        ("Check with", result.get("command") or _verify_command(result)),
    ]
    return [(name, words(value, 2000)) for name, value in rows if value is not None]


def _verify_command(result: Mapping[str, Any]) -> str | None:
    """Return the command that verifies the model of an embedding."""
    model, kit = result.get("model_path"), result.get("kit")
    return shlex.join(["mtlsign", "verify", "--model", model, "--kit", kit]) if model and kit else None
