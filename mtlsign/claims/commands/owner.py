"""Functions behind the jobs publish, claim, council and dispute: settings in, JSON values out.

A notebook can call each of them. Modules that need PyTorch are imported inside the functions, because reading
a ledger should not take seconds.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtlsign.claims import exposure, owner
from mtlsign.claims.blob_store import MAX_MODEL, BlobStore, read_model_bytes
from mtlsign.claims.bundle import write_bundle
from mtlsign.claims.claim_plan import ClaimPlan, plan_claim
from mtlsign.claims.commands.settings import (
    blob_store_from,
    checkpoint_json,
    claim_verifier,
    load_kits,
    open_ledger_from_settings,
    owner_from,
    write_card,
)
from mtlsign.claims.judging.council import MemberRound, run_member_round
from mtlsign.claims.judging.judge import ClaimVerifier
from mtlsign.claims.judging.lineage import DisputeResult, resolve_dispute
from mtlsign.claims.kit_commitments import KitCommitments
from mtlsign.claims.ledger.view import IncrementalReader, LedgerView, read_ledger
from mtlsign.claims.model_card import provenance_block
from mtlsign.config.claims import ClaimSettings, CouncilSettings, DisputeSettings, PublishSettings
from mtlsign.errors import ArtifactError, ClaimError, KeyMaterialError, LedgerError, StorageError
from mtlsign.watermark.keys.identity import Identity, load_identity, read_passphrase

if TYPE_CHECKING:
    from mtlsign.watermark.kit import OwnerKit

SQLITE = "sqlite:///"
_ONE_LOOK_S = 1e-6
"""Wait for a confirmation in which the ledger is read once."""


def publish(settings: PublishSettings) -> dict[str, Any]:
    """Commit to a marked model before it is released.

    A missing SQLite ledger is created with the owner as its only member.

    Raises:
        ClaimError: the model does not belong to the kit, its watermark was rejected and `force` is not set,
            or it is public already and `allow_public` is not set.
    """
    from mtlsign.storage.model_folder import read_model

    is_new = settings.ledger.startswith(SQLITE) and not Path(settings.ledger.removeprefix(SQLITE)).exists()
    model = read_model(settings.model, endpoint=settings.endpoint)
    identity, _ = load_identity(settings.owner, settings.passphrase_file)
    kits = load_kits(settings, identity)
    _require_publishable(settings, model.digest, kits)
    with open_ledger_from_settings(settings, create=True) as ledger:
        author = owner.Owner(identity, ledger, settings.witness_state)
        if ledger.size() == 0:
            if not settings.ledger.startswith(SQLITE):
                raise LedgerError(
                    "The ledger does not exist. Create it with jobs/ledger.py create.", field="ledger"
                )
            owner.create_ledger(author, [identity.public_key])
        disclosure = owner.already_disclosed(author, kits)
        if disclosure is not None and not settings.allow_public:
            raise ClaimError(
                f"Entry {disclosure} of the ledger names the model already. Pass --allow-public to publish "
                "nevertheless.",
                field="model",
            )
        entry, publication = owner.publish(
            author, kits, licence=settings.licence, recipient=settings.recipient
        )
        view = read_ledger(ledger)
        result = {
            "index": entry.index,
            "id": entry.leaf.hex(),
            "founded": is_new,
            "keys": publication.keys_count,
            "model_digest": model.digest,
            "time": view.time(entry.index),
            "counted": view.time(entry.index) is not None,
            "self_attested": view.self_attested(entry.index, identity.public_key),
            "head": checkpoint_json(ledger, view),
        }
    if settings.card is not None:
        write_card(settings.card, provenance_block(result))
    return result


def _require_publishable(settings: PublishSettings, digest: str, kits: Sequence[OwnerKit]) -> None:
    """Raise ClaimError as `publish` does."""
    if any(kit.info.get("model_digest") != digest for kit in kits):
        raise ClaimError(
            f"The model {digest} does not belong to the kit. Pass the marked model.", field="model"
        )
    if not settings.force and any(kit.info.get("status") in ("rejected", "unrelated") for kit in kits):
        raise ClaimError(
            "The watermark of this model was rejected when it was embedded, so a commitment to it proves "
            "nothing. Embed again with the advice of that run, or pass --force.",
            field="model",
        )
    if not settings.allow_public and exposure.is_publicly_readable(
        settings.model, endpoint=settings.endpoint
    ):
        raise ClaimError(
            "The model is publicly readable at its location, so a commitment would come too late. Move it, "
            "or pass --allow-public.",
            field="model",
        )


def claim(settings: ClaimSettings) -> dict[str, Any]:
    """Register a suspect model and open one key against it; optionally write a bundle for an offline check.

    Without a confirmed checkpoint over the registration no key is opened, and `claim` is None in the result:
    the same call opens it later. With `dry_run` nothing is written.

    Raises:
        ClaimError: no key of the kits is in the suspect, and `force` is not set. No key was opened.
    """
    suspect = read_model_bytes(settings.model, endpoint=settings.endpoint)
    archive = blob_store_from(settings)
    with open_ledger_from_settings(settings) as ledger:
        claimant = owner_from(settings, ledger)
        kits = load_kits(settings, claimant.identity)
        view = claimant.view()
        if settings.trace:
            kits = _kits_of_traced_copy(kits, suspect, settings.trusted_factory, view.councils[-1][1].bits)
        plan = plan_claim(view, KitCommitments(claimant.identity, kits), hashlib.sha256(suspect).digest())
        if not settings.force and not settings.trace:
            _require_key_present(kits, suspect, settings.trusted_factory, view.councils[-1][1].bits)
        if settings.dry_run:
            return _plan_json(view, plan, suspect)
        timeout = 0.0 if settings.open_unconfirmed else max(settings.confirmation_timeout, _ONE_LOOK_S)
        try:
            entry, statement = owner.claim(
                claimant,
                kits,
                archive,
                suspect,
                own_model=_own_model_bytes(settings, kits, archive),
                suspect_name=settings.suspect_name,
                confirmation_timeout=timeout,
            )
        except owner.UnconfirmedRegistrationError as error:
            registration = {"registration": error.registration.index, "registration_counted": False}
            return _plan_json(claimant.view(), plan, suspect) | registration
        view = claimant.view()
        result = {
            "claim": entry.leaf.hex(),
            "index": entry.index,
            "publication": statement.publish.index,
            "registration": statement.register.index,
            "registration_counted": view.time(statement.register.index) is not None,
            "key": statement.key_index,
            "suspect": statement.suspect.hex(),
            "marked_archived": archive.has(statement.model),
            "counted": view.time(entry.index) is not None,
            "head": checkpoint_json(ledger, view),
        }
        if settings.bundle is not None:
            write_bundle(settings.bundle, ledger, view, entry, archive)
            result["bundle"] = str(settings.bundle)
        return result


def _plan_json(view: LedgerView, plan: ClaimPlan, suspect: bytes) -> dict[str, Any]:
    """Return what a claim would use, in the form of a claim's result. `claim` is an earlier one or None."""
    registration = plan.registration
    return {
        "claim": plan.earlier[0].leaf.hex() if plan.earlier is not None else None,
        "publication": plan.published.index,
        "registration": registration.index if registration is not None else None,
        "registration_counted": registration is not None and view.time(registration.index) is not None,
        "key": plan.key_index,
        "keys": plan.publication.keys_count,
        "suspect": hashlib.sha256(suspect).hexdigest(),
    }


def _require_key_present(kits: Sequence[OwnerKit], suspect: bytes, factory: str | None, bits: int) -> None:
    """Verify the kits' keys on the suspect as each member will do, because a claim spends a key.

    Raises:
        ClaimError: no kit's key is in the model.
        ModelError: the model cannot be read.
    """
    from mtlsign.storage.safetensors_io import parse_safetensors
    from mtlsign.watermark.kit import detector_for_kit
    from mtlsign.watermark.verification.algorithm import verify

    tensors = parse_safetensors(suspect, max_bytes=MAX_MODEL)
    verdicts = [verify(tensors, detector_for_kit(kit, factory), bits=float(bits)) for kit in kits]
    if not any(verdict.status in ("accepted", "needs_commitment") for verdict in verdicts):
        best = max(verdicts, key=lambda verdict: verdict.evidence_bits)
        raise ClaimError(
            f"The model does not verifiably contain a key: {best.summary().rstrip('.')}; no key was opened. "
            "Pass --force to claim nevertheless.",
            field="model",
        )


def _kits_of_traced_copy(
    kits: Sequence[OwnerKit], suspect: bytes, factory: str | None, bits: int
) -> list[OwnerKit]:
    """Return the kits of the copy that the accused model was made from.

    Raises:
        ClaimError: it was made from none of the copies.
        ModelError: the model cannot be read.
    """
    from mtlsign.storage.safetensors_io import parse_safetensors
    from mtlsign.watermark.tracing import traced_copy

    tensors = parse_safetensors(suspect, max_bytes=MAX_MODEL)
    traced = traced_copy(kits, tensors, bits=float(bits), factory=factory)
    if not traced:
        raise ClaimError(
            f"None of the {len(kits)} keys reaches {bits} bits of evidence in the model, so it is traced to "
            "no copy; no key was opened. jobs/trace.py shows the evidence of each.",
            field="model",
        )
    return traced


def _own_model_bytes(settings: ClaimSettings, kits: Sequence[OwnerKit], archive: BlobStore) -> bytes | None:
    """Return the marked model from the settings, the archive, or `models/<digest>` of the kit's storage."""
    from mtlsign.storage.model_folder import MODELS

    if settings.own_model is not None:
        return read_model_bytes(settings.own_model, endpoint=settings.endpoint)
    digest = str(kits[0].info.get("model_digest"))
    with suppress(ValueError, ArtifactError):
        return archive.get(bytes.fromhex(digest), MAX_MODEL)
    first = settings.kit[0]
    path, mark, query = first.partition("?") if first.startswith("s3:") else (first, "", "")
    store = path.rstrip("/").rpartition("/")[0].rpartition("/")[0]
    with suppress(ArtifactError):
        return read_model_bytes(f"{store or '.'}/{MODELS}/{digest}{mark}{query}", endpoint=settings.endpoint)
    return None


def council(
    settings: CouncilSettings,
    *,
    judge: ClaimVerifier | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run one round of a council member, or rounds without end.

    A round that fails (no majority of the servers, a rewritten ledger) signs nothing. Its result contains the
    error, and the next round tries once more.

    Args:
        settings: the member's settings.
        judge: verifies keys on models; default: Algorithm 1.
        on_progress: receives the result of each round.

    Raises:
        LedgerError, StorageError: the round failed and `once` is set.
    """
    passphrase = read_passphrase(settings.passphrase_file) if settings.passphrase_file else None
    try:
        identity = Identity.load(settings.identity, passphrase)
    except KeyMaterialError as error:  # the member's file is passed as --identity, not --owner
        raise KeyMaterialError(error.detail, field="identity") from None
    archive = blob_store_from(settings)
    reader: IncrementalReader | None = None
    with nullcontext(judge) if judge is not None else claim_verifier(settings.trusted_factory) as verifier:
        while True:
            try:
                with open_ledger_from_settings(settings) as ledger:
                    reader = IncrementalReader(ledger, reader)
                    member_round = run_member_round(
                        identity, ledger, archive, verifier,
                        witness_state=settings.witness_state, reader=reader,
                    )  # fmt: skip
                    checkpoint = checkpoint_json(ledger, reader.view())
                    result = _round_json(identity, member_round) | {"head": checkpoint}
            except (LedgerError, StorageError) as error:
                if settings.once:
                    raise
                result = _round_json(identity, None) | {"head": None, "failed": str(error)}
            if on_progress is not None:
                on_progress(result)
            if settings.once:
                return result
            time.sleep(settings.interval)


def _round_json(identity: Identity, member_round: MemberRound | None) -> dict[str, Any]:
    if member_round is None:
        return {"member": identity.public_key.hex(), "votes": [], "cosigned": [], "remarks": []}
    before, after = member_round.before, member_round.after
    return {
        "member": identity.public_key.hex(),
        "votes": [
            asdict(finding) | {"claim": claim, "entry": vote} for claim, finding, vote in member_round.votes
        ],
        "cosigned": list(dict.fromkeys(before.cosigned + after.cosigned)),
        "remarks": [
            *dict.fromkeys(before.warnings + after.warnings),
            *(f"The vote on claim {claim} is postponed: {why}" for claim, why in member_round.postponed),
        ],
    }


def resolve_dispute_job(settings: DisputeSettings, *, judge: ClaimVerifier | None = None) -> DisputeResult:
    """Return findings, edges and standings of the named claims."""
    verifying = nullcontext(judge) if judge is not None else claim_verifier(settings.trusted_factory)
    with open_ledger_from_settings(settings) as ledger, verifying as verifier:
        archive, view = blob_store_from(settings), read_ledger(ledger)
        return resolve_dispute(view, settings.claims, archive, verifier, bits=settings.min_evidence_bits)
