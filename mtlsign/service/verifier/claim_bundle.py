"""Opened claims as the service takes them: a JSON object, or the file that `jobs/claim.py --bundle` writes.

    {"opening": {"format", "spec", "public_key", "signature"}, "reference": base64, "head": base64 or null,
     "claim": 64 hex or absent}

`opening` is `docs/format.md`'s key opening, `reference` (and a trained `head`) are safetensors bytes, `claim`
is the claim's id in the ledger. It holds no W0 and no identity. An owner kit is never taken.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import re
import zipfile
from dataclasses import dataclass, field, replace
from typing import Any

from mtlsign.claims.blob_store import MAX_REFERENCE
from mtlsign.claims.merkle import leaf_hash
from mtlsign.claims.statements.envelope import MAX_ENVELOPE
from mtlsign.claims.statements.parsing import open_statement
from mtlsign.claims.statements.types import Claim
from mtlsign.errors import MTLSignError
from mtlsign.service.json_input import read_json
from mtlsign.service.problems import Problem, problem_from_error
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.keys.sealing import MAGIC as SEALED
from mtlsign.watermark.keys.spec import Spec

MAX_HEAD = 64 * 2**20
MAX_MEMBERS = 2000
MAX_DIRECTORY = MAX_MEMBERS * 256
_CLAIM = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class OpenedClaim:
    """One opened claim, its signature checked. Secret until the claim is public; never shown by `repr`."""

    opening: KeyOpening = field(repr=False)
    spec: Spec = field(repr=False)
    key: bytes = field(repr=False)
    reference: bytes = field(repr=False)
    head: bytes | None = field(repr=False)
    claim: str | None = None
    #: whether the opening lay in that very claim; else the claim is only named beside it
    bound: bool = False

    @property
    def key_id(self) -> str:
        """How verdicts name the key."""
        return key_id(self.key)

    @property
    def head_digest(self) -> str:
        """SHA-256 of a trained head, hex; of nothing for a keyed one."""
        return hashlib.sha256(self.head or b"").hexdigest()


def key_id(key: bytes) -> str:
    """How verdicts name a key without showing it: SHA-256 of a domain and the key, hex."""
    return hashlib.sha256(b"mtlsign/v0/key-id" + key).hexdigest()


def read_bundle(data: bytes) -> OpenedClaim:
    """An opened claim from anybody's bytes: JSON or a claim file. Raises: Problem."""
    if data.startswith(SEALED):
        raise Problem("kit-refused", "this is an owner kit; send the opened claim (jobs/claim.py --bundle)")
    if data.startswith(b"PK\x03\x04"):
        return _from_file(data)
    try:
        found = read_json(data)
    except ValueError:
        raise Problem("bad-bundle", "the bundle is no JSON object with each field once") from None
    return take_bundle(found)


def take_bundle(found: object) -> OpenedClaim:
    """An opened claim from a parsed JSON value. Raises: Problem."""
    if not isinstance(found, dict):
        raise Problem("bad-bundle", "the bundle must be an object")
    secret = {"kit", "w0", "seed", "kit_key", "secret", "info"} & found.keys()
    if secret:
        raise Problem("kit-refused", f"the bundle holds {sorted(secret)[0]!r}: owner kits stay at home")
    if not {"opening", "reference"} <= found.keys() <= {"opening", "reference", "head", "claim"}:
        raise Problem("bad-bundle", "a bundle has opening, reference, and perhaps head and claim")
    claim = found.get("claim")
    if claim is not None and not (isinstance(claim, str) and _CLAIM.fullmatch(claim)):
        raise Problem("bad-bundle", "claim must be the 64 hex digits of a claim's id")
    head = found.get("head")
    try:
        opening = KeyOpening.from_json(json.dumps(found["opening"]))
    except (MTLSignError, ValueError, TypeError, RecursionError) as error:
        raise Problem("bad-bundle", str(error)[:300]) from None
    reference = _base64(found["reference"], "reference")
    return _checked(opening, reference, None if head is None else _base64(head, "head"), claim)


def _checked(opening: KeyOpening, reference: bytes, head: bytes | None, claim: str | None) -> OpenedClaim:
    try:
        spec, key = opening.parse(), opening.key()
    except MTLSignError as error:
        raise problem_from_error(error, about="bundle") from None
    if hashlib.sha256(reference).hexdigest() != spec.reference:
        raise Problem("bad-bundle", "the reference is not the one that the spec names")
    if (spec.head.kind == "free") != (head is not None):
        raise Problem("bad-bundle", "a trained head is opened with the claim, and only there")
    return OpenedClaim(opening, spec, key, reference, head, claim)


def _from_file(data: bytes) -> OpenedClaim:
    """The opened claim in a claim file. Its proofs are `jobs/verify.py --bundle`'s to check; here it counts
    as an opening, and what the ledger says of it is read from the ledger.
    """
    try:
        _check_directory(data)
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            if len(file.infolist()) > MAX_MEMBERS:
                raise ValueError
            index = read_json(_member(file, "bundle.json", 256))["claim"]
            if type(index) is not int or index < 0:
                raise ValueError
            envelope = _member(file, f"entries/{index}", MAX_ENVELOPE)
            claim, _ = open_statement(envelope)
            if not isinstance(claim, Claim):
                raise ValueError
            reference = _member(file, f"blobs/{claim.opening.parse().reference}", MAX_REFERENCE)
            named = claim.heads[claim.key_index] if claim.key_index < len(claim.heads) else None
            head = None if named is None else _member(file, f"blobs/{named.hex()}", MAX_HEAD)
    except MTLSignError as error:
        raise problem_from_error(error, about="bundle") from None
    except (
        zipfile.BadZipFile,
        ValueError,
        KeyError,
        TypeError,
        OSError,
        EOFError,
        RuntimeError,
        RecursionError,
    ):
        raise Problem("bad-bundle", "the claim file is damaged or too large; write it again") from None
    if head is not None and hashlib.sha256(head).digest() != named:
        raise Problem("bad-bundle", "the head is not the one that the claim names")
    return replace(_checked(claim.opening, reference, head, leaf_hash(envelope).hex()), bound=True)


def _check_directory(data: bytes) -> None:
    """Bound the ZIP's table of contents before zipfile makes an object of each of its (millions of) entries.

    Raises: ValueError, also for what our writer never makes: comments, ZIP64.
    """
    end = data[-22:]
    if len(end) != 22 or end[:4] != b"PK\x05\x06" or data[-42:-38] == b"PK\x06\x07":
        raise ValueError("no plain end of a ZIP")
    if int.from_bytes(end[12:16], "little") > MAX_DIRECTORY or end[20:] != b"\0\0":
        raise ValueError("too large a table of contents, or a comment")


def _member(file: zipfile.ZipFile, name: str, limit: int) -> bytes:
    info = file.getinfo(name)
    if (
        info.compress_type != zipfile.ZIP_STORED
        or info.file_size != info.compress_size
        or info.file_size > limit
    ):
        raise ValueError("compressed or too large")
    return file.read(info)


def to_json(
    opening: KeyOpening, reference: bytes, head: bytes | None = None, claim: str | None = None
) -> dict[str, Any]:
    """The JSON form, as the client sends it."""
    found: dict[str, Any] = {"opening": json.loads(opening.to_json()), "reference": _text(reference)}
    return (
        found | ({} if head is None else {"head": _text(head)}) | ({} if claim is None else {"claim": claim})
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _base64(value: object, where: str) -> bytes:
    try:
        if not isinstance(value, str):
            raise ValueError
        return base64.b64decode(value, validate=True)
    except (ValueError, binascii.Error):
        raise Problem("bad-bundle", f"{where} must be base64") from None
