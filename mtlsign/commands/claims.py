"""Commands around the ledger: `mtlsign publish`, `claim`, `council`, `dispute` and `ledger`."""

from __future__ import annotations

from typing import Any

from mtlsign.config.claims import (
    ClaimSettings,
    CouncilSettings,
    DisputeSettings,
    LedgerJobSettings,
    PublishSettings,
)
from mtlsign.config.cli import Output, job
from mtlsign.errors import SettingsError
from mtlsign.reports import console
from mtlsign.reports.formatting import utc_time


@job(PublishSettings)
def publish(settings: PublishSettings) -> Output:
    """Commit to a marked model before its release. Release it only when `counted` is true."""
    from mtlsign.claims.commands import owner

    result = owner.publish(settings)
    lines = [f"published as entry {result['index']} of {settings.ledger}"]
    if not result["counted"]:
        lines.append("  not yet under a confirmed checkpoint: keep the model until enough members co-signed")
    elif result["self_attested"]:
        lines.append("  attested by you alone: other witnesses must co-sign before the time counts")
    return Output(result, "\n".join([*lines, result["head"]["note"]]))


@job(ClaimSettings)
def claim(settings: ClaimSettings) -> Output:
    """Open one key against a suspect model. This spends the key.

    The suspect is archived and registered first. The key is opened when the council has co-signed the
    registration. An opened key is public: it supports no claim on a model that is registered later.
    --dry-run writes nothing.
    """
    from mtlsign.claims.commands import owner

    result = owner.claim(settings)
    if settings.dry_run or result["claim"] is None:
        return Output(result, "\n".join(_plan_lines(result, dry_run=settings.dry_run)))
    lines = [
        f"claim {result['claim']}",
        f"  entry {result['index']}, key {result['key']} of entry {result['publication']}",
    ]
    if not result["registration_counted"]:
        lines.append("  the registration is not yet under a confirmed checkpoint")
    if not result["marked_archived"]:
        lines.append("  your marked model is not in the archive: the lineage needs it (--own-model)")
    return Output(result, "\n".join(lines))


def _plan_lines(result: dict[str, Any], *, dry_run: bool) -> list[str]:
    """Return the lines about a claim that opened no key."""
    key = f"key {result['key']} of {result['keys']} of the publication in entry {result['publication']}"
    if result["claim"] is not None:
        return [f"The model is claimed already: {result['claim']}.", "Nothing was written."]
    if dry_run:
        state = "co-signed" if result["registration_counted"] else "not co-signed yet"
        registration = (
            "It would be registered first."
            if result["registration"] is None
            else f"It is registered as entry {result['registration']}, {state}."
        )
        return [
            f"The model contains a key. A claim would open and spend {key}.",
            registration,
            "Nothing was written, and no key was opened.",
        ]
    return [
        f"Registered as entry {result['registration']}. No key was opened.",
        f"Run the same command again when the council has co-signed. It then opens and spends {key}.",
    ]


@job(CouncilSettings)
def council(settings: CouncilSettings) -> None:
    """Act as a member of the council, in rounds.

    A round checks the whole ledger, co-signs its checkpoints, verifies each new claim and appends the vote of
    this member. If the ledger contradicts an earlier round, the round is an error and signs nothing.
    """
    from mtlsign.claims.commands import owner

    def show(result: dict[str, Any]) -> None:
        if settings.json_output:
            console.print_json(result)
        else:
            print("\n".join(_round_lines(result)), flush=True)

    owner.council(settings, on_progress=show)


def _round_lines(result: dict[str, Any]) -> list[str]:
    """Return the votes, warnings and checkpoint of one round."""
    lines = [
        f"claim {vote['claim']}: {vote['status']} ({vote['matches']} of {vote['n']}) {vote['reason']}"
        for vote in result["votes"]
    ]
    lines += [f"warning: {remark}" for remark in result["remarks"]]
    if "failed" in result:
        return [*lines, f"the round failed and signed nothing: {result['failed']}"]
    return [*lines, f"checkpoint of {result['head']['entries']} entries, co-signed {result['cosigned']}"]


@job(DisputeSettings)
def dispute(settings: DisputeSettings) -> Output:
    """Resolve a dispute: verdicts of all keys on all models, the lineage, and the standing of each claim."""
    from mtlsign.claims.commands.owner import resolve_dispute_job

    result = resolve_dispute_job(settings)
    lines = [
        f"key of {claim[:16]} on model {model[:16]}: {finding.status}, {finding.evidence_bits:.1f} bits"
        for claim, row in result.matrix.items()
        for model, finding in row.items()
    ]
    for edge in result.edges:
        arrow = f"{edge.ancestor[:16]} -> {edge.descendant[:16]}" if edge.ancestor and edge.descendant else ""
        lines.append(f"{edge.kind} {arrow}: {edge.reason}")
    for standing in result.standings:
        lines.append(f"{standing.claim[:16]}: {standing.standing}\n  {standing.sentence}")
    return Output(result.to_json(), "\n".join(lines))


@job(LedgerJobSettings, positional="action")
def ledger(settings: LedgerJobSettings) -> Output:
    """Create, read and check a ledger: `mtlsign ledger ACTION --ledger URI`.

    create   starts a ledger
    head     shows the newest confirmed checkpoint; --output FILE writes it
    prove    shows an entry with its proof (--index N)
    check    recomputes everything, with --head FILE also against a stored checkpoint
    list     shows all entries
    members  proposes or signs another council
    exhibit  answers a claim
    bundle   exports a claim for an offline check
    """
    from mtlsign.claims.commands.ledger import ACTIONS

    if settings.action not in ACTIONS:
        raise SettingsError(f"The first argument is one of {', '.join(ACTIONS)}. See --help.", field="action")
    result = ACTIONS[settings.action](settings)
    if settings.action == "list":
        text = "\n".join(
            f"{entry['index']} {entry['id'][:16]} {entry['kind'] or entry['problem']} "
            f"{'pending' if entry['time'] is None else utc_time(entry['time'])}"
            for entry in result["entries"]
        )
    else:
        note = result.get("note") or result.get("head", {}).get("note")
        text = note or console.table([(name, _cell(name, value)) for name, value in result.items()])
    return Output(result, text)


def _cell(name: str, value: object) -> str:
    """Return a value of a ledger action for the table; times are dates."""
    return utc_time(value) if name == "time" and isinstance(value, int) else str(value)
