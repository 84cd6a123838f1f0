"""What a witness keeps on disk: the tree it co-signed last, its own lines, and which ledger lies where.

    <memory>                 origin, frontier, time: what the next head must extend
    <memory>.lines           its co-signatures, one a line, so that deleting them from a store does not last
    …/witness/…-at-….json    without a named memory: origin of the ledger at this place, pinned at first use

The first and the last carry a keyed checksum, so a flipped bit or a stranger's edit is seen.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtlsign.claims import merkle
from mtlsign.errors import KeyMaterialError, LedgerError
from mtlsign.storage.strict_json import parse_strict_json, require_fields, require_hex
from mtlsign.watermark.keys.identity import Identity, default_identity_path

VERSION = "mtlsign/witness/v0"
PIN_VERSION = "mtlsign/place/v0"
MAX_STATE = 64 * 1024
MAX_LINES = 64 * 2**20
_FIELDS = ("version", "public_key", "origin", "size", "frontier", "time", "check")


@dataclass(frozen=True)
class WitnessState:
    """What a witness last co-signed: ledger, tree (as its frontier), and the time it gave."""

    origin: bytes
    tree: merkle.CompactRange
    time: int


def default_path(identity: Identity, origin: bytes) -> Path:
    """Where a witness keeps its memory: beside the default identity, one file for each ledger."""
    return _folder() / f"{identity.public_key.hex()[:16]}-{origin.hex()[:16]}.json"


def load(identity: Identity, path: Path) -> WitnessState | None:
    """The memory in that file; None where there is none.

    Raises:
        KeyMaterialError: it is damaged, or another witness's.
    """
    got = _read(path, *_FIELDS)
    if got is None:
        return None
    if _hex(got["public_key"]) != identity.public_key or got["version"] != VERSION:
        raise KeyMaterialError("is another witness's; name your own file", field="memory")
    listed, size, stamp = got["frontier"], got["size"], got["time"]
    if not isinstance(listed, list) or type(size) is not int or type(stamp) is not int:
        raise _damaged(path)
    try:
        tree = merkle.CompactRange(size, [_hex(one) for one in listed])
    except ValueError:
        raise _damaged(path) from None
    found = WitnessState(_hex(got["origin"]), tree, stamp)
    if _hex(got["check"]) != _check(identity, found):
        raise _damaged(path)
    return found


def save(identity: Identity, path: Path, memory: WitnessState) -> None:
    """Replace the memory, whole or not at all; when this returns it is on the disk."""
    _write(
        path,
        {
            "version": VERSION,
            "public_key": identity.public_key.hex(),
            "origin": memory.origin.hex(),
            "size": memory.tree.size,
            "frontier": [one.hex() for one in memory.tree.hashes],
            "time": memory.time,
            "check": _check(identity, memory).hex(),
        },
    )


def append_own_line(path: Path, size: int, line: str) -> None:
    """Add one of our co-signatures, `size` entries of the ledger, before it is published."""
    with open(_lines(path), "a", encoding="utf-8") as file:
        file.write(f"\n{size} {line}")  # the break first: a torn line damages only itself
        file.flush()
        os.fsync(file.fileno())


def remembered_lines(path: Path) -> list[tuple[int, str]]:
    """Our co-signatures as (size, note line), at most 64 MiB of the newest. Nothing is verified here."""
    found: list[tuple[int, str]] = []
    try:
        with open(_lines(path), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_LINES))
            data = file.read(MAX_LINES)
    except FileNotFoundError:
        return found
    for row in data.decode("utf-8", "replace").splitlines():
        size, _, line = row.partition(" ")
        if size.isascii() and size.isdigit() and len(size) < 15:
            found.append((int(size), line))
    return found


def pin_path(identity: Identity, place: str) -> Path:
    """Where the origin of the ledger at `place` is pinned."""
    name = hashlib.sha256(place.encode()).hexdigest()[:16]
    return _folder() / f"{identity.public_key.hex()[:16]}-at-{name}.json"


def pinned_origin(identity: Identity, place: str) -> bytes | None:
    """Origin of the ledger that this identity knew at `place`; None: it was never there.

    Raises:
        KeyMaterialError: the pin is damaged.
    """
    path = pin_path(identity, place)
    got = _read(path, "version", "place", "origin", "check")
    if got is None:
        return None
    origin = _hex(got["origin"])
    right = got["version"] == PIN_VERSION and got["place"] == place
    if not right or _hex(got["check"]) != _pin_check(identity, place, origin):
        raise _damaged(path)
    return origin


def pin_origin(identity: Identity, place: str, origin: bytes) -> None:
    """Remember that the ledger at `place` is `origin`."""
    check = _pin_check(identity, place, origin).hex()
    _write(
        pin_path(identity, place),
        {"version": PIN_VERSION, "place": place, "origin": origin.hex(), "check": check},
    )


def refuse_known_store(identity: Identity, place: str, path: Path | None) -> None:
    """Raises LedgerError when a ledger is about to be founded where this witness already knew one."""
    old = load(identity, path) if path is not None else None
    origin = old.origin if old is not None else (None if path is not None else pinned_origin(identity, place))
    if origin is not None:
        where = path or pin_path(identity, place)
        raise LedgerError(
            f"was there before, with origin {origin.hex()[:16]}…, and is gone: restore it; if you mean to "
            f"begin anew, delete {where}",
            field="ledger",
        )


def _folder() -> Path:
    return default_identity_path().parent / "witness"


def _lines(path: Path) -> Path:
    return path.with_name(path.name + ".lines")


def _check(identity: Identity, memory: WitnessState) -> bytes:
    text = f"{memory.origin.hex()} {memory.tree.size} {memory.time} {memory.tree.root().hex()}"
    return hmac.digest(identity.kit_key, b"mtlsign/v0/witness\n" + text.encode(), "sha256")


def _pin_check(identity: Identity, place: str, origin: bytes) -> bytes:
    return hmac.digest(identity.kit_key, b"mtlsign/v0/place\n" + origin + place.encode(), "sha256")


def _hex(value: object) -> bytes:
    return require_hex(value, "memory", 32)


def _damaged(path: Path) -> KeyMaterialError:
    return KeyMaterialError(f"{path} is damaged; restore it from a copy", field="memory")


def _read(path: Path, *names: str) -> dict[str, object] | None:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_STATE + 1)
    except FileNotFoundError:
        return None
    return require_fields(parse_strict_json(data, limit=MAX_STATE, where="memory"), "memory", *names)


def _write(path: Path, fields: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with open(part, "w", encoding="utf-8") as file:
        file.write(json.dumps(fields, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
