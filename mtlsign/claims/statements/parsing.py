"""Parser of untrusted statements: the payload bytes are exactly one statement, or a ClaimError is raised."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from mtlsign.claims.merkle import MAX_SIZE
from mtlsign.claims.statements import envelope
from mtlsign.claims.statements.types import (
    PREDICATE,
    STATEMENT,
    VOTES,
    Claim,
    Exhibit,
    Fields,
    Membership,
    Publish,
    Ref,
    Register,
    Statement,
    Vote,
)
from mtlsign.errors import ClaimError, FormatError, KeyMaterialError, OldVersionError
from mtlsign.storage.strict_json import parse_strict_json, raise_invalid, require_fields, require_hex
from mtlsign.storage.versions import PUBLISH_AGAIN, refuse_version_0
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening, check_public_key
from mtlsign.watermark.keys.spec import plain_text

MAX_PAYLOAD = 48 * 1024
MAX_KEYS, MAX_MODELS, MAX_MEMBERS = 256, 12, 64
MAX_TIME = 2**53
MIN_WINDOW, MAX_WINDOW = 1, 10 * 366 * 86_400


def sign_statement(statement: Statement, *identities: Identity) -> bytes:
    """Return the signed envelope of a statement, checked by the rules that every reader applies.

    Raises:
        ClaimError: the statement breaks a rule of `docs/claims.md`, or its author is not among the signers.
    """
    payload = statement.payload()
    if parse(payload) != statement:
        raise ClaimError(
            "The statement cannot be read back unchanged. Use plain text in its fields.", field=statement.kind
        )
    data = envelope.sign(payload, *identities)
    open_statement(data)
    return data


def open_statement(data: bytes) -> tuple[Statement, tuple[bytes, ...]]:
    """Return the statement of an untrusted envelope and the public keys of its signers, all verified.

    Raises:
        ClaimError: it is malformed, not signed by its author, or has several signers and is no membership.
    """
    opened = envelope.open_envelope(data)
    statement = parse(opened.payload)
    if statement.signer not in opened.signers:
        raise ClaimError(
            "The author named in the statement did not sign it. Sign it with the author's identity.",
            field="signature",
        )
    if len(opened.signers) != 1 and not isinstance(statement, Membership):
        raise ClaimError(
            "Only a membership can have several signatures. Sign with one identity.", field="signature"
        )
    return statement, opened.signers


def disclosed_opening(data: bytes) -> KeyOpening | None:
    """Return the key that the bytes of a claim make public, or None. Signatures do not matter."""
    try:
        statement = parse(envelope.read_payload(data))
    except ClaimError:
        return None
    return statement.opening if isinstance(statement, Claim) else None


def parse(payload: bytes) -> Statement:
    """Parse the exact bytes of one statement (at most 48 KiB).

    Raises:
        ClaimError: they are not one well-formed statement. No other exception is raised.
    """
    try:
        statement = _parse(payload)
    except OldVersionError as error:
        raise ClaimError(error.detail, field=error.field) from None
    except FormatError as error:
        raise ClaimError(f"{error.problem}. See docs/claims.md for the format.", field=error.field) from None
    except KeyMaterialError as error:
        raise ClaimError(error.detail, field=error.field) from None
    return statement


def _parse(payload: bytes) -> Statement:
    value = parse_strict_json(payload, limit=MAX_PAYLOAD, where="statement")
    refuse_version_0(value, "predicateType", where="statement", fix=PUBLISH_AGAIN)
    document = require_fields(
        value, "statement", "_type", "subject", "predicateType", "predicate",
    )  # fmt: skip
    kind = str(document["predicateType"]).removeprefix(PREDICATE)
    if (
        document["_type"] != STATEMENT
        or document["predicateType"] != PREDICATE + kind
        or kind not in _BUILDERS
    ):
        raise_invalid(
            "statement.predicateType", "The predicateType or _type is not a statement of this version"
        )
    names, build = _BUILDERS[kind]
    fields = require_fields(document["predicate"], kind, "signer", "ledger", "time", *names)
    signer = require_hex(fields["signer"], f"{kind}.signer", 32)
    check_public_key(signer)
    ledger = _optional_hex(fields["ledger"], f"{kind}.ledger")
    if ledger is None and kind != "membership":
        raise_invalid(f"{kind}.ledger", "The field must be the origin of the ledger")
    common = {"signer": signer, "ledger": ledger, "time": _integer(fields, "time", 0, MAX_TIME, kind)}
    subject = document["subject"]
    if not isinstance(subject, list):
        raise_invalid("statement.subject", "The field must be a list")
    statement = build(fields, [_subject(item) for item in subject], common)
    if [(n, a, d.hex()) for n, a, d in statement.subject()] != [_subject(item) for item in subject]:
        raise_invalid("statement.subject", "The subject does not match the predicate")
    return statement


def _subject(item: object) -> tuple[str, str, str]:
    fields = require_fields(item, "subject", "name", "digest")
    digest = fields["digest"]
    if not isinstance(digest, dict) or len(digest) != 1:
        raise_invalid("subject.digest", "The field must hold exactly one digest")
    ((algorithm, value),) = digest.items()
    return (
        plain_text(fields["name"], "subject.name"),
        algorithm,
        require_hex(value, "subject.digest", 32).hex(),
    )


def _publish(fields: Fields, subject: list[tuple[str, str, str]], common: Mapping[str, Any]) -> Publish:
    keys = require_fields(fields["keys"], "publish.keys", "root", "count")
    return Publish(
        nonce=require_hex(fields["nonce"], "publish.nonce", 32),
        keys_root=require_hex(keys["root"], "publish.keys.root", 32),
        keys_count=_integer(keys, "count", 1, MAX_KEYS, "publish.keys"),
        heads=require_hex(fields["head"], "publish.head", 32),
        model=_single_digest(subject),
        licence=_optional_text(fields["licence"], "publish.licence"),
        recipient=_optional_text(fields["recipient"], "publish.recipient"),
        **common,
    )


def _register(fields: Fields, subject: list[tuple[str, str, str]], common: Mapping[str, Any]) -> Register:
    digests = [digest for _, _, digest in subject]
    if not 1 <= len(subject) <= MAX_MODELS or len(set(digests)) != len(digests):
        raise_invalid("register.subject", f"The subject must list 1 to {MAX_MODELS} different models")
    return Register(models=tuple((name, bytes.fromhex(digest)) for name, _, digest in subject), **common)


def _claim(fields: Fields, subject: list[tuple[str, str, str]], common: Mapping[str, Any]) -> Claim:
    key = require_fields(fields["key"], "claim.key", "index", "salt", "path")
    head = require_fields(fields["head"], "claim.head", "salt", "sha256")
    model = require_fields(fields["model"], "claim.model", "salt", "sha256")
    path, heads = key["path"], head["sha256"]
    if (
        not isinstance(path, list)
        or len(path) > 8
        or not isinstance(heads, list)
        or not 1 <= len(heads) <= MAX_KEYS
    ):
        raise_invalid("claim", "key.path must be a list of at most 8 hashes, head.sha256 a list of 1 to 256")
    opening = KeyOpening.from_json(json.dumps(fields["opening"]))
    return Claim(
        publish=_ref(fields["publish"], "claim.publish"),
        register=_ref(fields["register"], "claim.register"),
        suspect=_single_digest(subject),
        opening=opening,
        key_index=_integer(key, "index", 0, MAX_KEYS - 1, "claim.key"),
        key_salt=require_hex(key["salt"], "claim.key.salt", 32),
        key_path=tuple(require_hex(step, "claim.key.path", 32) for step in path),
        heads=tuple(_optional_hex(item, "claim.head.sha256") for item in heads),
        heads_salt=require_hex(head["salt"], "claim.head.salt", 32),
        model=require_hex(model["sha256"], "claim.model.sha256", 32),
        model_salt=require_hex(model["salt"], "claim.model.salt", 32),
        **common,
    )


def _vote(fields: Fields, subject: list[tuple[str, str, str]], common: Mapping[str, Any]) -> Vote:
    if fields["status"] not in VOTES:
        raise_invalid("vote.status", f"The status must be one of {', '.join(VOTES)}")
    return Vote(
        claim=_ref(fields["claim"], "vote.claim"),
        suspect=_single_digest(subject),
        key=require_hex(fields["key"], "vote.key", 32),
        status=str(fields["status"]),
        matches=_integer(fields, "matches", 0, 65_536, "vote"),
        n=_integer(fields, "n", 0, 65_536, "vote"),
        millibits=_integer(fields, "millibits", 0, 10**9, "vote"),
        bits=_integer(fields, "bits", 0, 4096, "vote"),
        reason=_optional_text(fields["reason"], "vote.reason"),
        **common,
    )


def _exhibit(fields: Fields, subject: list[tuple[str, str, str]], common: Mapping[str, Any]) -> Exhibit:
    return Exhibit(
        claim=_ref(fields["claim"], "exhibit.claim"),
        stamp=_ref(fields["stamp"], "exhibit.stamp"),
        model=_single_digest(subject),
        salt=_optional_hex(fields["salt"], "exhibit.salt"),
        **common,
    )


def _membership(fields: Fields, subject: list[tuple[str, str, str]], common: Mapping[str, Any]) -> Membership:
    items = fields["members"]
    if not isinstance(items, list) or not 1 <= len(items) <= MAX_MEMBERS:
        raise_invalid("membership.members", f"The field must list 1 to {MAX_MEMBERS} public keys")
    members = tuple(require_hex(member, "membership.members", 32) for member in items)
    for member in members:
        check_public_key(member)
    if list(members) != sorted(set(members)):
        raise_invalid("membership.members", "The members must be distinct and in ascending order")
    previous = None if fields["previous"] is None else _ref(fields["previous"], "membership.previous")
    if (previous is None) != (common["ledger"] is None):
        raise_invalid("membership.previous", "The field must be null if and only if the ledger is null")
    return Membership(
        members=members,
        threshold=_integer(fields, "threshold", len(members) // 2 + 1, len(members), "membership"),
        bits=_integer(fields, "bits", 1, 4096, "membership"),
        window=_integer(fields, "window", MIN_WINDOW, MAX_WINDOW, "membership"),
        previous=previous,
        **common,
    )


_Builder = Callable[[Fields, list[tuple[str, str, str]], Mapping[str, Any]], Statement]
_BUILDERS: dict[str, tuple[tuple[str, ...], _Builder]] = {
    "publish": (("nonce", "keys", "head", "licence", "recipient"), _publish),
    "register": ((), _register),
    "claim": (("publish", "register", "opening", "key", "head", "model"), _claim),
    "vote": (("claim", "key", "status", "matches", "n", "millibits", "bits", "reason"), _vote),
    "exhibit": (("claim", "stamp", "salt"), _exhibit),
    "membership": (("members", "threshold", "bits", "window", "previous"), _membership),
}


def _integer(fields: Fields, name: str, low: int, high: int, where: str) -> int:
    value = fields[name]
    if type(value) is not int or not low <= value <= high:
        raise_invalid(f"{where}.{name}", f"The value must be an integer from {low} to {high}")
    return value


def _single_digest(subject: list[tuple[str, str, str]]) -> bytes:
    if len(subject) != 1:
        raise_invalid("statement.subject", "The statement must have exactly one subject")
    return bytes.fromhex(subject[0][2])


def _optional_text(value: object, where: str) -> str:
    return "" if value == "" else plain_text(value, where)


def _optional_hex(value: object, where: str) -> bytes | None:
    return None if value is None else require_hex(value, where, 32)


def _ref(value: object, where: str) -> Ref:
    fields = require_fields(value, where, "index", "leaf")
    return Ref(
        _integer(fields, "index", 0, MAX_SIZE, where), require_hex(fields["leaf"], f"{where}.leaf", 32)
    )
