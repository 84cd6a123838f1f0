"""Report of a checked claim: one self-contained HTML page for a judge.

The page holds no script and loads nothing, which its Content-Security-Policy enforces. Every value is
escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtlsign.reports.formatting import utc_time, words
from mtlsign.reports.pages import render_page

_TONES = {"supported": "good", "not_supported": "bad", "prior_art": "bad", "inherited": "bad"}
_DAY_S = 86_400


def render_claim_report(result: Mapping[str, Any]) -> str:
    """Render the page of a checked bundle.

    Args:
        result: fields of `mtlsign.claims.bundle_result.to_json`, with those of the verdict.

    Returns:
        The HTML text.
    """
    council, standing = result["council"], str(result["standing"])
    return render_page(
        "claim.html.j2",
        kind="MTLSign claim report",
        subject=words(result["suspect"], 64),
        tone=_TONES.get(standing, "open"),
        standing=standing,
        sentence=result["sentence"],
        caveat=result["caveat"],
        remarks=result["remarks"],
        parties=_parties(result),
        policy=_policy(result),
        times=_times(result),
        votes=[_vote(vote) for vote in result["votes"]],
        cosigners=[(words(member, 64), utc_time(time)) for member, time in council["cosigned"].items()],
        pinned=result["head"]["pinned"],
    )


def _parties(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("Claimant (public key)", result["claimant"]),
        ("Claim", result["claim"]),
        ("Accused model (SHA-256)", result["suspect"]),
        ("Name that the registration gives it", result["suspect_name"]),
        ("Marked model of the claimant (SHA-256)", result["marked_model"]),
        ("Licence named by the claimant", result["licence"]),
        ("Recipient named by the claimant", result["recipient"]),
    ]
    return [(name, words(value, 200)) for name, value in rows if value]


def _policy(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    council, numbers = result["council"], result["numbers"]
    members, signed = len(council["members"]), len(council["cosigned"])
    trust = "given by the verifier" if result["head"]["pinned"] else "taken from the bundle, not confirmed"
    return [
        (
            "Evidence",
            f"{numbers['evidence_bits']:.1f} bits ({numbers['matches']} of {numbers['n']} bits match)",
        ),
        ("Evidence required by this verification", f"{numbers['bits_required']} bits"),
        ("Evidence required by the council", f"{council['bits']} bits"),
        ("Votes required by the council", f"{council['threshold']} of {members} members"),
        ("Time in which votes count", f"{council['window'] / _DAY_S:g} days"),
        ("Outcome of the votes", words(numbers["council"])),
        ("Ledger (hash of entry 0)", words(result["ledger"], 64)),
        ("Checkpoint", f"{result['head']['size']} entries, {trust}"),
        ("Members who co-signed the checkpoint", f"{signed} of {council['checkpoint_members']}"),
    ]


def _times(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    numbers, times = result["numbers"], result["times"]
    rows = [
        ("Commitment of key and marked model", numbers["publication"], times["published"]),
        ("Registration of the accused model", numbers["registered"], times["registered"]),
        ("Opening of the key (claim)", numbers["entry"], times["claimed"]),
    ]
    return [(name, f"entry {index}, {_moment(time)}") for name, index, time in rows]


def _moment(time: int | None) -> str:
    return "not yet under a confirmed checkpoint" if time is None else f"confirmed by {utc_time(time)}"


def _vote(vote: Mapping[str, Any]) -> dict[str, str]:
    return {
        "member": words(vote["member"], 64),
        "status": words(vote["status"]),
        "evidence": f"{vote['evidence_bits']:.1f}",
        "time": "" if vote["time"] is None else utc_time(vote["time"]),
        "counted": "yes" if vote["counts"] else words(vote["problem"], 200),
    }
