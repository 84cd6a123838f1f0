"""Statements from strangers: payload bytes that are exactly one statement, or a ClaimError."""

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
from mtlsign.errors import ClaimError, FormatError, KeyMaterialError
from mtlsign.storage.strict_json import parse_strict_json, raise_invalid, require_fields, require_hex
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening, check_public_key
from mtlsign.watermark.keys.spec import plain_text

MAX_PAYLOAD = 48 * 1024
MAX_KEYS, MAX_MODELS, MAX_MEMBERS = 256, 12, 64
MAX_TIME = 2**53
MIN_WINDOW, MAX_WINDOW = 1, 10 * 366 * 86_400


def sign_statement(statement: Statement, *identities: Identity) -> bytes:
    """The signed envelope of a statement, checked as any reader will check it.

    Raises:
        ClaimError: the statement breaks a rule of `docs/claims.md`, or its author is not among the signers.
    """
    payload = statement.payload()
    if parse(payload) != statement:
        raise ClaimError("does not read back as it was written; give plain text", field=statement.kind)
    data = envelope.sign(payload, *identities)
    open_statement(data)
    return data


def open_statement(data: bytes) -> tuple[Statement, tuple[bytes, ...]]:
    """The statement of an envelope from anywhere, and who signed it: every signature is checked.

    Raises:
        ClaimError: malformed, not signed by its author, or signed by others too though it is no membership.
    """
    opened = envelope.open_envelope(data)
    statement = parse(opened.payload)
    if statement.signer not in opened.signers:
        raise ClaimError("is not the author that the statement names", field="signature")
    if len(opened.signers) != 1 and not isinstance(statement, Membership):
        raise ClaimError("only a membership has several signatures; sign alone", field="signature")
    return statement, opened.signers


def parse(payload: bytes) -> Statement:
    """Read one statement's exact bytes (at most 48 KiB).

    Raises:
        ClaimError: they are not one well-formed statement; nothing else is ever raised.
    """
    try:
        found = _parse(payload)
    except FormatError as error:
        raise ClaimError(
            f"{error.problem}; docs/claims.md says what belongs here", field=error.field
        ) from None
    except KeyMaterialError as error:
        raise ClaimError(error.detail, field=error.field) from None
    return found


def _parse(payload: bytes) -> Statement:
    whole = require_fields(
        parse_strict_json(payload, limit=MAX_PAYLOAD, where="statement"),
        "statement", "_type", "subject", "predicateType", "predicate",
    )  # fmt: skip
    kind = str(whole["predicateType"]).removeprefix(PREDICATE)
    if whole["_type"] != STATEMENT or whole["predicateType"] != PREDICATE + kind or kind not in _READERS:
        raise_invalid("statement.predicateType", "is not a statement of this version")
    names, build = _READERS[kind]
    got = require_fields(whole["predicate"], kind, "signer", "ledger", "time", *names)
    signer = require_hex(got["signer"], f"{kind}.signer", 32)
    check_public_key(signer)
    ledger = _maybe(got["ledger"], f"{kind}.ledger")
    if ledger is None and kind != "membership":
        raise_invalid(f"{kind}.ledger", "must name the ledger by its origin")
    common = {"signer": signer, "ledger": ledger, "time": _int(got, "time", 0, MAX_TIME, kind)}
    subject = whole["subject"]
    if not isinstance(subject, list):
        raise_invalid("statement.subject", "must be a list")
    found = build(got, [_subject(item) for item in subject], common)
    if [(n, a, d.hex()) for n, a, d in found.subject()] != [_subject(item) for item in subject]:
        raise_invalid("statement.subject", "is not what the predicate says")
    return found


def _subject(item: object) -> tuple[str, str, str]:
    one = require_fields(item, "subject", "name", "digest")
    digest = one["digest"]
    if not isinstance(digest, dict) or len(digest) != 1:
        raise_invalid("subject.digest", "must hold one digest")
    ((algorithm, value),) = digest.items()
    return plain_text(one["name"], "subject.name"), algorithm, require_hex(value, "subject.digest", 32).hex()


def _publish(got: Fields, subject: list[tuple[str, str, str]], common: Mapping[str, Any]) -> Publish:
    keys = require_fields(got["keys"], "publish.keys", "root", "count")
    return Publish(
        nonce=require_hex(got["nonce"], "publish.nonce", 32),
        keys_root=require_hex(keys["root"], "publish.keys.root", 32),
        keys_count=_int(keys, "count", 1, MAX_KEYS, "publish.keys"),
        heads=require_hex(got["head"], "publish.head", 32),
        model=_only(subject),
        licence=_remark(got["licence"], "publish.licence"),
        recipient=_remark(got["recipient"], "publish.recipient"),
        **common,
    )


def _register(got: Fields, subject: list[tuple[str, str, str]], common: Mapping[str, Any]) -> Register:
    digests = [digest for _, _, digest in subject]
    if not 1 <= len(subject) <= MAX_MODELS or len(set(digests)) != len(digests):
        raise_invalid("register.subject", f"must list 1 to {MAX_MODELS} different models")
    return Register(models=tuple((name, bytes.fromhex(digest)) for name, _, digest in subject), **common)


def _claim(got: Fields, subject: list[tuple[str, str, str]], common: Mapping[str, Any]) -> Claim:
    key = require_fields(got["key"], "claim.key", "index", "salt", "path")
    head = require_fields(got["head"], "claim.head", "salt", "sha256")
    model = require_fields(got["model"], "claim.model", "salt", "sha256")
    path, heads = key["path"], head["sha256"]
    if (
        not isinstance(path, list)
        or len(path) > 8
        or not isinstance(heads, list)
        or not 1 <= len(heads) <= MAX_KEYS
    ):
        raise_invalid("claim", "key.path must be a list of at most 8, head.sha256 of 1 to 256")
    opening = KeyOpening.from_json(json.dumps(got["opening"]))
    return Claim(
        publish=_take_ref(got["publish"], "claim.publish"),
        register=_take_ref(got["register"], "claim.register"),
        suspect=_only(subject),
        opening=opening,
        key_index=_int(key, "index", 0, MAX_KEYS - 1, "claim.key"),
        key_salt=require_hex(key["salt"], "claim.key.salt", 32),
        key_path=tuple(require_hex(step, "claim.key.path", 32) for step in path),
        heads=tuple(_maybe(one, "claim.head.sha256") for one in heads),
        heads_salt=require_hex(head["salt"], "claim.head.salt", 32),
        model=require_hex(model["sha256"], "claim.model.sha256", 32),
        model_salt=require_hex(model["salt"], "claim.model.salt", 32),
        **common,
    )


def _vote(got: Fields, subject: list[tuple[str, str, str]], common: Mapping[str, Any]) -> Vote:
    if got["status"] not in VOTES:
        raise_invalid("vote.status", f"must be one of {', '.join(VOTES)}")
    return Vote(
        claim=_take_ref(got["claim"], "vote.claim"),
        suspect=_only(subject),
        key=require_hex(got["key"], "vote.key", 32),
        status=str(got["status"]),
        matches=_int(got, "matches", 0, 65_536, "vote"),
        n=_int(got, "n", 0, 65_536, "vote"),
        millibits=_int(got, "millibits", 0, 10**9, "vote"),
        bits=_int(got, "bits", 0, 4096, "vote"),
        reason=_remark(got["reason"], "vote.reason"),
        **common,
    )


def _exhibit(got: Fields, subject: list[tuple[str, str, str]], common: Mapping[str, Any]) -> Exhibit:
    return Exhibit(
        claim=_take_ref(got["claim"], "exhibit.claim"),
        stamp=_take_ref(got["stamp"], "exhibit.stamp"),
        model=_only(subject),
        salt=_maybe(got["salt"], "exhibit.salt"),
        **common,
    )


def _membership(got: Fields, subject: list[tuple[str, str, str]], common: Mapping[str, Any]) -> Membership:
    listed = got["members"]
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_MEMBERS:
        raise_invalid("membership.members", f"must list 1 to {MAX_MEMBERS} public keys")
    members = tuple(require_hex(member, "membership.members", 32) for member in listed)
    for member in members:
        check_public_key(member)
    if list(members) != sorted(set(members)):
        raise_invalid("membership.members", "must be different and in rising order")
    previous = None if got["previous"] is None else _take_ref(got["previous"], "membership.previous")
    if (previous is None) != (common["ledger"] is None):
        raise_invalid("membership.previous", "is missing exactly where the statement founds a ledger")
    return Membership(
        members=members,
        threshold=_int(got, "threshold", len(members) // 2 + 1, len(members), "membership"),
        bits=_int(got, "bits", 1, 4096, "membership"),
        window=_int(got, "window", MIN_WINDOW, MAX_WINDOW, "membership"),
        previous=previous,
        **common,
    )


_Build = Callable[[Fields, list[tuple[str, str, str]], Mapping[str, Any]], Statement]
_READERS: dict[str, tuple[tuple[str, ...], _Build]] = {
    "publish": (("nonce", "keys", "head", "licence", "recipient"), _publish),
    "register": ((), _register),
    "claim": (("publish", "register", "opening", "key", "head", "model"), _claim),
    "vote": (("claim", "key", "status", "matches", "n", "millibits", "bits", "reason"), _vote),
    "exhibit": (("claim", "stamp", "salt"), _exhibit),
    "membership": (("members", "threshold", "bits", "window", "previous"), _membership),
}


def _int(fields: Fields, name: str, low: int, high: int, where: str) -> int:
    value = fields[name]
    if type(value) is not int or not low <= value <= high:
        raise_invalid(f"{where}.{name}", f"must be an integer from {low} to {high}")
    return value


def _only(subject: list[tuple[str, str, str]]) -> bytes:
    if len(subject) != 1:
        raise_invalid("statement.subject", "must hold exactly one")
    return bytes.fromhex(subject[0][2])


def _remark(value: object, where: str) -> str:
    return "" if value == "" else plain_text(value, where)


def _maybe(value: object, where: str) -> bytes | None:
    return None if value is None else require_hex(value, where, 32)


def _take_ref(value: object, where: str) -> Ref:
    got = require_fields(value, where, "index", "leaf")
    return Ref(_int(got, "index", 0, MAX_SIZE, where), require_hex(got["leaf"], f"{where}.leaf", 32))
