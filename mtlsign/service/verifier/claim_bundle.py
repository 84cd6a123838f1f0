"""Opened claims as clients send them: a JSON object, or the file that `jobs/claim.py --bundle` writes.

    {"opening": {"format", "spec", "public_key", "signature"}, "reference": base64, "head": base64 or null,
     "claim": 64 hex or absent}

`opening` is the key opening of `docs/format.md`, `reference` and a trained `head` are safetensors bytes,
`claim` is the id of the claim in the ledger. Neither form contains a base model or an identity. Owner kits
are refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import re
from dataclasses import dataclass, field, replace
from typing import Any

from mtlsign.claims.blob_store import MAX_REFERENCE
from mtlsign.claims.merkle import leaf_hash
from mtlsign.claims.statements.envelope import MAX_ENVELOPE
from mtlsign.claims.statements.parsing import open_statement
from mtlsign.claims.statements.types import Claim
from mtlsign.errors import MTLSignError
from mtlsign.service.problems import Problem, problem_from_error
from mtlsign.storage.json_io import parse_bounded_json
from mtlsign.storage.zip_reader import BoundedZip, DamagedZipError
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.keys.sealing import MAGIC as KIT_MAGIC
from mtlsign.watermark.keys.sealing import OLD_MAGIC as OLD_KIT_MAGIC
from mtlsign.watermark.keys.spec import Spec

MAX_HEAD = 64 * 2**20
_ZIP_MAGIC = b"PK\x03\x04"
_CLAIM = re.compile(r"[0-9a-f]{64}")
_SECRET_FIELDS = {"kit", "w0", "seed", "kit_key", "secret", "info"}
_REQUIRED, _FIELDS = {"opening", "reference"}, {"opening", "reference", "head", "claim"}


@dataclass(frozen=True)
class OpenedClaim:
    """Opened claim with a valid signature. Secret until the claim is public; never shown by `repr`."""

    opening: KeyOpening = field(repr=False)
    spec: Spec = field(repr=False)
    key: bytes = field(repr=False)
    reference: bytes = field(repr=False)
    head: bytes | None = field(repr=False)
    claim: str | None = None
    #: whether the opening was read from that claim; otherwise the client only named the claim
    bound: bool = False

    @property
    def key_id(self) -> str:
        """Id of the key in verdicts."""
        return key_id(self.key)

    @property
    def head_digest(self) -> str:
        """SHA-256 of a trained head, hex; of no bytes for a key-derived head."""
        return hashlib.sha256(self.head or b"").hexdigest()


def key_id(key: bytes) -> str:
    """Return the id of a key in verdicts, which does not reveal it: SHA-256 of a domain and the key, hex."""
    return hashlib.sha256(b"mtlsign/v1/key-id" + key).hexdigest()


def read_bundle(data: bytes) -> OpenedClaim:
    """Read an opened claim from untrusted bytes: JSON or a claim file. Raises Problem."""
    if data.startswith((KIT_MAGIC, OLD_KIT_MAGIC)):
        detail = "This is an owner kit. Send the opened claim (jobs/claim.py --bundle)."
        raise Problem("kit-refused", detail)
    if data.startswith(_ZIP_MAGIC):
        return _from_claim_file(data)
    try:
        bundle = parse_bounded_json(data)
    except ValueError:
        detail = "The bundle is not a JSON object with unique fields. Send the opened claim."
        raise Problem("bad-bundle", detail) from None
    return parse_bundle(bundle)


def parse_bundle(bundle: object) -> OpenedClaim:
    """Parse an opened claim from a JSON value. Raises Problem."""
    if not isinstance(bundle, dict):
        raise Problem("bad-bundle", "The bundle is not an object. Send the opened claim.")
    secret = _SECRET_FIELDS & bundle.keys()
    if secret:
        detail = f"The bundle contains {sorted(secret)[0]!r}, a part of an owner kit. Never send a kit."
        raise Problem("kit-refused", detail)
    if not _REQUIRED <= bundle.keys() <= _FIELDS:
        detail = (
            "An opened claim has the fields opening and reference, and optionally head and claim. "
            "Send the file that `mtlsign claim --bundle` wrote."
        )
        raise Problem("bad-bundle", detail)
    claim = bundle.get("claim")
    if claim is not None and not (isinstance(claim, str) and _CLAIM.fullmatch(claim)):
        raise Problem("bad-bundle", "claim must be the id of a claim, 64 lower-case hexadecimal digits.")
    head = bundle.get("head")
    try:
        opening = KeyOpening.from_json(json.dumps(bundle["opening"]))
    except (MTLSignError, ValueError, TypeError, RecursionError) as error:
        raise Problem("bad-bundle", str(error)[:300]) from None
    reference = _from_base64(bundle["reference"], "reference")
    return _checked(opening, reference, None if head is None else _from_base64(head, "head"), claim)


def _checked(opening: KeyOpening, reference: bytes, head: bytes | None, claim: str | None) -> OpenedClaim:
    """Check the signature and that reference and head belong to the spec."""
    try:
        spec, key = opening.parse(), opening.key()
    except MTLSignError as error:
        raise problem_from_error(error, about="bundle") from None
    if hashlib.sha256(reference).hexdigest() != spec.reference:
        detail = "The reference is not the one in the spec. Send the reference of the same kit."
        raise Problem("bad-bundle", detail)
    if (spec.head.kind == "free") != (head is not None):
        detail = "A bundle has a head exactly if the spec has a trained head. Send both or neither."
        raise Problem("bad-bundle", detail)
    return OpenedClaim(opening, spec, key, reference, head, claim)


def _from_claim_file(data: bytes) -> OpenedClaim:
    """Read the opened claim in a claim file.

    The proofs in the file are not checked: `jobs/verify.py --bundle` does that. The service reads the state
    of the claim from the ledger.
    """
    try:
        file = BoundedZip(io.BytesIO(data), len(data), member_limit=lambda _: len(data))
        index = parse_bounded_json(_member(file, "bundle.json", 256))["claim"]
        if type(index) is not int or index < 0:
            raise ValueError
        envelope = _member(file, f"entries/{index}", MAX_ENVELOPE)
        claim, _ = open_statement(envelope)
        if not isinstance(claim, Claim):
            raise ValueError
        reference = _member(file, f"blobs/{claim.opening.parse().reference}", MAX_REFERENCE)
        head_digest = claim.heads[claim.key_index] if claim.key_index < len(claim.heads) else None
        head = None if head_digest is None else _member(file, f"blobs/{head_digest.hex()}", MAX_HEAD)
    except (DamagedZipError, ValueError, KeyError, TypeError, OSError, RecursionError):
        detail = "The claim file is damaged or too large. Write it again with jobs/claim.py --bundle."
        raise Problem("bad-bundle", detail) from None
    except MTLSignError as error:
        raise problem_from_error(error, about="bundle") from None
    if head is not None and hashlib.sha256(head).digest() != head_digest:
        raise Problem("bad-bundle", "The head is not the one that the claim names. Write the file again.")
    return replace(_checked(claim.opening, reference, head, leaf_hash(envelope).hex()), bound=True)


def _member(file: BoundedZip, name: str, limit: int) -> bytes:
    if file.size(name) > limit:
        raise ValueError("a member over its limit")
    return file.read(name)


def to_json(
    opening: KeyOpening, reference: bytes, head: bytes | None = None, claim: str | None = None
) -> dict[str, Any]:
    """Return the JSON form of an opened claim.

    Args:
        opening: opening of the key.
        reference: safetensors bytes of the reference.
        head: safetensors bytes of a trained head, or None.
        claim: id of the claim in the ledger, or None.
    """
    bundle: dict[str, Any] = {"opening": json.loads(opening.to_json()), "reference": _to_base64(reference)}
    if head is not None:
        bundle["head"] = _to_base64(head)
    if claim is not None:
        bundle["claim"] = claim
    return bundle


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _from_base64(value: object, field_name: str) -> bytes:
    try:
        if not isinstance(value, str):
            raise ValueError
        return base64.b64decode(value, validate=True)
    except (ValueError, binascii.Error):
        raise Problem("bad-bundle", f"{field_name} must be base64.") from None
