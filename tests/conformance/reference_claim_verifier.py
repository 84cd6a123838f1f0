"""Second implementation of `docs/claims.md`, written from that text with `cryptography` as only dependency.

It shares no code with the package. From entries and co-signatures it derives kinds, times and votes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

KINDS = {
    "publish": {"nonce", "keys", "head", "licence", "recipient"},
    "register": set(),
    "claim": {"publish", "register", "opening", "key", "head", "model"},
    "vote": {"claim", "key", "status", "matches", "n", "millibits", "bits", "reason"},
    "exhibit": {"claim", "stamp", "salt"},
    "membership": {"members", "threshold", "bits", "window", "previous"},
}


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def lp(x: bytes) -> bytes:
    return len(x).to_bytes(8, "big") + x


def verify(key: bytes, signature: bytes, message: bytes) -> bool:
    try:
        return Ed25519PublicKey.from_public_bytes(key).verify(signature, message) is None
    except (InvalidSignature, ValueError):
        return False


# --- RFC 6962 ---


def leaf(data: bytes) -> bytes:
    return sha256(b"\0", data)


def root(leaves: list[bytes]) -> bytes:
    if len(leaves) < 2:
        return leaves[0] if leaves else sha256()
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return sha256(b"\1", root(leaves[:k]), root(leaves[k:]))


def from_path(hashed: bytes, index: int, size: int, path: list[bytes]) -> bytes:
    if size == 1:
        return hashed if not path else b""
    k = 1 << (size - 1).bit_length() - 1
    if not path:
        return b""
    if index < k:
        return sha256(b"\1", from_path(hashed, index, k, path[:-1]), path[-1])
    return sha256(b"\1", path[-1], from_path(hashed, index - k, size - k, path[:-1]))


def consistency(old: int, leaves: list[bytes], is_complete: bool = True) -> list[bytes]:
    if old == len(leaves):
        return [] if is_complete else [root(leaves)]
    k = 1 << (len(leaves) - 1).bit_length() - 1
    if old <= k:
        return [*consistency(old, leaves[:k], is_complete), root(leaves[k:])]
    return [*consistency(old - k, leaves[k:], False), root(leaves[:k])]


# --- envelopes and statements ---


def open_envelope(data: bytes) -> tuple[dict[str, Any], set[str]] | None:
    """Return the statement and its signers, or None if the entry has no effect."""
    try:
        envelope = json.loads(data)
        payload = base64.b64decode(envelope["payload"], validate=True)
        kind = envelope["payloadType"].encode()
        pae = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
        signers = set()
        for item in envelope["signatures"]:
            if not verify(bytes.fromhex(item["keyid"]), base64.b64decode(item["sig"]), pae):
                return None
            signers.add(item["keyid"])
        if json.dumps(envelope, separators=(",", ":")).encode() != data or len(data) > 65536:
            return None
        statement = json.loads(payload)
        name = statement["predicateType"].removeprefix("urn:mtlsign:v1:")
        fields = statement["predicate"].keys() - {"signer", "ledger", "time"}
        right = statement["_type"] == "https://in-toto.io/Statement/v1" and fields == KINDS[name]
        known = statement["predicate"]["signer"] in signers
        return (statement | {"kind": name}, signers) if right and known else None
    except (ValueError, KeyError, TypeError):
        return None


def read(rows: list[bytes], cosignatures: list[dict[str, Any]]) -> dict[str, Any]:
    """Return origin, kinds, times, statements and councils of a ledger."""
    leaves = [leaf(row) for row in rows]
    origin, councils, kinds, statements = leaves[0].hex(), [], [], []
    for index, row in enumerate(rows):
        opened = open_envelope(row)
        statement = opened[0] if opened else None
        if statement and statement["predicate"]["ledger"] != (None if index == 0 else origin):
            statement = None
        if statement and opened and statement["kind"] == "membership" and index:
            at, now = councils[-1]
            enough = len(opened[1] & set(now["members"])) >= now["threshold"]
            follows = statement["predicate"]["previous"] == {"index": at, "leaf": leaves[at].hex()}
            statement = statement if enough and follows else None
        if statement and statement["kind"] == "membership":
            councils.append((index, statement["predicate"]))
        kinds.append(statement["kind"] if statement else None)
        statements.append(statement)
    confirmed, times = confirmed_checkpoints(origin, leaves, councils, cosignatures), []
    for index in range(len(rows)):
        later = [time for size, time in confirmed if size > index]
        times.append(later[0] if later else None)
    return {"origin": origin, "kinds": kinds, "times": times, "statements": statements, "councils": councils,
            "leaves": [digest.hex() for digest in leaves]}  # fmt: skip


def confirmed_checkpoints(
    origin: str, leaves: list[bytes], councils: list[Any], cosignatures: list[dict[str, Any]]
) -> list[tuple[int, int]]:
    """Return (size, time) of each confirmed checkpoint."""
    signed: dict[int, dict[str, int]] = {}
    for item in cosignatures:
        size = item["size"]
        body = f"mtlsign/ledger/v1/{origin}\n{size}\n{base64.b64encode(root(leaves[:size])).decode()}\n"
        _, name, blob = item["line"].split(" ")
        raw, key = base64.b64decode(blob), bytes.fromhex(name.removeprefix("mtlsign/member/"))
        time, right_id = int.from_bytes(raw[4:12], "big"), sha256(name.encode(), b"\n\x04", key)[:4]
        if raw[:4] == right_id and verify(key, raw[12:], f"cosignature/v1\ntime {time}\n{body}".encode()):
            times = signed.setdefault(size, {})
            times[key.hex()] = min(time, times.get(key.hex(), time))  # a member's earliest line
    counted, seal = dict[int, int](), 2**63
    for start, council in reversed(councils):  # a later council seals the times of the earlier ones
        first = seal
        for size in sorted((s for s in signed if s > start), reverse=True):
            times = sorted(t for m, t in signed.pop(size).items() if m in council["members"] and t <= seal)
            if len(times) >= council["threshold"]:
                first = counted[size] = times[len(times) // 2]
        seal = first
    return [(size, max(t for s, t in counted.items() if s <= size)) for size in sorted(counted)]


def key_of(claim: dict[str, Any]) -> bytes:
    """Return the opened key (`docs/format.md`)."""
    opening = claim["predicate"]["opening"]
    spec, public = base64.b64decode(opening["spec"]), bytes.fromhex(opening["public_key"])
    signature = bytes.fromhex(opening["signature"])
    assert verify(public, signature, b"mtlsign/v1/spec" + lp(spec) + lp(public))
    return sha256(b"mtlsign/v1/key", lp(spec), lp(public), lp(signature))


def commit(kind: str, salt: str, *parts: bytes) -> bytes:
    return sha256(lp(b"mtlsign/v1/hiding/" + kind.encode()), lp(bytes.fromhex(salt)), *map(lp, parts))


def is_committed(claim: dict[str, Any], publication: dict[str, Any]) -> bool:
    """Return whether key, heads and marked model of a claim match the commitments of its publication."""
    p, c = publication["predicate"], claim["predicate"]
    path = [bytes.fromhex(step) for step in c["key"]["path"]]
    hidden = leaf(commit("key", c["key"]["salt"], key_of(claim)))
    author = bytes.fromhex(c["signer"])
    heads = [b"keyed" if head is None else bytes.fromhex(head) for head in c["head"]["sha256"]]
    model = publication["subject"][0]["digest"]["mtlsignHidingV1"]
    return (
        from_path(hidden, c["key"]["index"], p["keys"]["count"], path).hex() == p["keys"]["root"]
        and commit("head", c["head"]["salt"], author, *heads).hex() == p["head"]
        and commit("model", c["model"]["salt"], author, bytes.fromhex(c["model"]["sha256"])).hex() == model
        and p["signer"] == c["signer"] == c["opening"]["public_key"]
    )


def votes(ledger: dict[str, Any], index: int) -> dict[str, int]:
    """Return the counted votes on the claim at `index`, by status."""
    council = [c for at, c in ledger["councils"] if at < index][-1]
    claim, claim_time = ledger["statements"][index], ledger["times"][index]
    counts, voters = dict[str, int](), set()
    for at, vote in enumerate(ledger["statements"]):
        if not vote or vote["kind"] != "vote":
            continue
        v, vote_time = vote["predicate"], ledger["times"][at]
        right = v["claim"] == {"index": index, "leaf": ledger["leaves"][index]} and at > index
        right = right and v["key"] == key_of(claim).hex() and vote["subject"] == claim["subject"]
        is_timed = vote_time is not None and claim_time is not None
        in_time = is_timed and vote_time <= claim_time + council["window"]
        by_policy = v["bits"] == council["bits"] and v["signer"] in council["members"]
        if right and in_time and by_policy and v["signer"] not in voters:
            voters.add(v["signer"])
            counts[v["status"]] = counts.get(v["status"], 0) + 1
    return counts
