"""Function behind `jobs/verify.py --verdict`: check of a verdict that a verification service signed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from mtlsign.claims.blob_store import read_model_bytes
from mtlsign.claims.statements.envelope import MAX_ENVELOPE, open_envelope
from mtlsign.claims.statements.types import PREDICATE, STATEMENT, VOTES
from mtlsign.config.verify import VerdictSettings
from mtlsign.errors import ClaimError, KeyMaterialError
from mtlsign.reports.formatting import utc_time
from mtlsign.storage.strict_json import parse_strict_json, require_fields, require_hex

TRUSTED = "The signer is one of the given keys."
UNTRUSTED = (
    "No key was given, so it is not checked which service signed. Compare the signer with the service's "
    "/v1/keys, or pass its key with --key."
)
_TEXTS = ("status", "statistic", "reason", "id")
_INTEGERS = ("time", "matches", "n", "near_zero", "millibits", "millibits_required")
_FIELDS = (*_TEXTS, *_INTEGERS, "signer", "key", "claim")


def check_verdict(settings: VerdictSettings) -> dict[str, Any]:
    """Return the fields of a signed verdict whose signature is valid.

    Raises:
        ClaimError: the file is no verdict, the signature is invalid, the signer is not one of the given keys,
            or the verdict is about another model.
    """
    trusted = [key.lower() for key in settings.key]
    for key in trusted:
        if len(key) != 64 or not all(digit in "0123456789abcdef" for digit in key):
            raise ClaimError("A public key has 64 hexadecimal digits. Copy it from /v1/keys.", field="key")
    try:
        with open(settings.verdict, "rb") as file:
            envelope = file.read(MAX_ENVELOPE + 1)
    except OSError as error:
        raise ClaimError(
            f"{settings.verdict}: {error.strerror}. Pass a downloaded verdict.", field="verdict"
        ) from None
    fields, signers = _read(envelope)
    if trusted and fields["signer"] not in trusted:
        raise ClaimError(
            f"The verdict was signed by {fields['signer']}, which is not one of the given keys. Do not rely "
            "on it, or pass the key of the service that you trust.",
            field="key",
        )
    if fields["signer"] not in signers:
        raise ClaimError(
            "The signer named in the verdict did not sign it. Download it once more.", field="verdict"
        )
    if settings.model is not None:
        digest = hashlib.sha256(read_model_bytes(settings.model, endpoint=settings.endpoint)).hexdigest()
        if digest != fields["suspect"]:
            raise ClaimError(
                f"The verdict is about the model {fields['suspect']}, and this model is {digest}. Pass the "
                "verified model.",
                field="model",
            )
    return {
        **fields,
        "signed": utc_time(fields["time"]),
        "evidence_bits": fields["millibits"] / 1000,
        "bits_required": fields["millibits_required"] / 1000,
        "trusted": bool(trusted),
        "caveat": TRUSTED if trusted else UNTRUSTED,
    }


def _read(envelope: bytes) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of the verdict in an envelope, and the public keys whose signatures are valid."""
    opened = open_envelope(envelope)
    try:
        statement = require_fields(
            parse_strict_json(opened.payload, limit=MAX_ENVELOPE, where="verdict"),
            "verdict", "_type", "subject", "predicateType", "predicate",
        )  # fmt: skip
        if (statement["_type"], statement["predicateType"]) != (STATEMENT, PREDICATE + "verdict"):
            raise _foreign_error()
        predicate = require_fields(statement["predicate"], "verdict.predicate", *_FIELDS)
        subject = statement["subject"]
        if not isinstance(subject, list) or len(subject) != 1:
            raise _foreign_error()
        digest = require_fields(subject[0], "verdict.subject", "name", "digest")["digest"]
        suspect = require_hex(require_fields(digest, "digest", "sha256")["sha256"], "verdict.subject", 32)
        require_hex(predicate["signer"], "verdict.signer", 32)
        require_hex(predicate["key"], "verdict.key", 32)
    except KeyMaterialError as error:
        raise ClaimError(error.detail, field=error.field) from None
    if not _is_well_formed(predicate):
        raise _foreign_error()
    return {"suspect": suspect.hex(), **predicate}, [key.hex() for key in opened.signers]


def _is_well_formed(predicate: Mapping[str, object]) -> bool:
    return (
        all(isinstance(predicate[name], str) for name in _TEXTS)
        and all(type(predicate[name]) is int for name in _INTEGERS)
        and predicate["status"] in VOTES
    )


def _foreign_error() -> ClaimError:
    return ClaimError(
        "The file is not a verdict of a service. Pass the bytes as they were downloaded.", field="verdict"
    )
