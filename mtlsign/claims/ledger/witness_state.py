"""Persistent state of a witness: the last co-signed tree, the witness's own lines, and pinned origins.

    <state>                  origin, tree and time that the next checkpoint must extend
    <state>.lines            the witness's co-signatures, one per line, to restore lines deleted from a store
    <state>.past             times of checkpoints under former councils, to detect lines that arrive late
    …/witness/…-at-….json    without a named state: origin of the ledger in this store, pinned at first use

The state and the pin are protected by an HMAC, which detects corruption and modification.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtlsign.claims import merkle
from mtlsign.errors import KeyMaterialError, LedgerError
from mtlsign.storage.local import atomic_write
from mtlsign.storage.strict_json import parse_strict_json, require_fields, require_hex
from mtlsign.storage.versions import PUBLISH_AGAIN, refuse_version_0
from mtlsign.watermark.keys.identity import Identity, default_identity_path

VERSION = "mtlsign/witness/v1"
PIN_VERSION = "mtlsign/place/v1"
FIELD = "witness-state"
MAX_STATE = 64 * 1024
MAX_LINES_BYTES = 64 * 2**20
_FIELDS = ("version", "public_key", "origin", "size", "frontier", "time", "check")


@dataclass(frozen=True)
class WitnessState:
    """Last co-signature of a witness: origin of the ledger, tree, and time by the witness's clock."""

    origin: bytes
    tree: merkle.CompactRange
    time: int


def default_path(identity: Identity, origin: bytes) -> Path:
    """Return the default path of a witness's state: one file per ledger, next to the default identity."""
    return _folder() / f"{identity.public_key.hex()[:16]}-{origin.hex()[:16]}.json"


def load(identity: Identity, path: Path) -> WitnessState | None:
    """Return the state stored at `path`, or None if the file does not exist.

    Raises:
        KeyMaterialError: the file is damaged or belongs to another witness.
    """
    fields = _read(path, *_FIELDS)
    if fields is None:
        return None
    if _hex(fields["public_key"]) != identity.public_key or fields["version"] != VERSION:
        raise KeyMaterialError(
            "The file belongs to another witness. Pass the file of this identity.", field=FIELD
        )
    hashes, size, time = fields["frontier"], fields["size"], fields["time"]
    if not isinstance(hashes, list) or type(size) is not int or type(time) is not int:
        raise _damaged_error(path)
    try:
        tree = merkle.CompactRange(size, [_hex(digest) for digest in hashes])
    except ValueError:
        raise _damaged_error(path) from None
    state = WitnessState(_hex(fields["origin"]), tree, time)
    if _hex(fields["check"]) != _state_mac(identity, state):
        raise _damaged_error(path)
    return state


def save(identity: Identity, path: Path, state: WitnessState) -> None:
    """Replace the state atomically; when the function returns, the file is on the disk.

    Args:
        identity: the witness; its kit key authenticates the file.
        path: file to write.
        state: the new state.
    """
    _write(
        path,
        {
            "version": VERSION,
            "public_key": identity.public_key.hex(),
            "origin": state.origin.hex(),
            "size": state.tree.size,
            "frontier": [digest.hex() for digest in state.tree.hashes],
            "time": state.time,
            "check": _state_mac(identity, state).hex(),
        },
    )


def append_own_line(path: Path, size: int, line: str) -> None:
    """Append one co-signature to the state's lines, before it is published.

    Args:
        path: file of the state.
        size: number of entries of the co-signed tree.
        line: line of the signed note.
    """
    with open(_lines_path(path), "a", encoding="utf-8") as file:
        file.write(f"\n{size} {line}")  # line break first, so that a torn line damages only itself
        file.flush()
        os.fsync(file.fileno())


def load_own_lines(path: Path) -> list[tuple[int, str]]:
    """Return the witness's co-signatures as (size, line of the note), unverified; at most the last 64 MiB."""
    lines: list[tuple[int, str]] = []
    try:
        with open(_lines_path(path), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_LINES_BYTES))
            data = file.read(MAX_LINES_BYTES)
    except FileNotFoundError:
        return lines
    for row in data.decode("utf-8", "replace").splitlines():
        size, _, line = row.partition(" ")
        if size.isascii() and size.isdigit() and len(size) < 15:
            lines.append((int(size), line))
    return lines


def save_past(path: Path, start: int, times: Mapping[int, int]) -> None:
    """Store the times of checkpoints under former councils, to detect co-signatures that arrive later.

    Args:
        path: file of the state.
        start: index of the membership in force.
        times: size of each confirmed checkpoint up to that index → its time.
    """
    _write(_past_path(path), {"start": start, "times": [[size, times[size]] for size in sorted(times)]})


def load_past(path: Path, start: int) -> dict[int, int] | None:
    """Return the times that `save_past` stored for this membership; None if there are none."""
    try:
        fields = json.loads(_past_path(path).read_bytes())
        return dict(fields["times"]) if fields["start"] == start else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def pin_path(identity: Identity, store_id: str) -> Path:
    """Return the file that pins the origin of the ledger in the store `store_id`."""
    name = hashlib.sha256(store_id.encode()).hexdigest()[:16]
    return _folder() / f"{identity.public_key.hex()[:16]}-at-{name}.json"


def pinned_origin(identity: Identity, store_id: str) -> bytes | None:
    """Return the origin pinned for this identity and store, or None if there is none.

    Raises:
        KeyMaterialError: the pin is damaged.
    """
    path = pin_path(identity, store_id)
    fields = _read(path, "version", "place", "origin", "check")
    if fields is None:
        return None
    origin = _hex(fields["origin"])
    matches = fields["version"] == PIN_VERSION and fields["place"] == store_id
    if not matches or _hex(fields["check"]) != _pin_mac(identity, store_id, origin):
        raise _damaged_error(path)
    return origin


def pin_origin(identity: Identity, store_id: str, origin: bytes) -> None:
    """Pin the origin of the ledger in a store.

    Args:
        identity: the witness.
        store_id: `Ledger.store_id`.
        origin: leaf hash of entry 0, 32 bytes.
    """
    mac = _pin_mac(identity, store_id, origin).hex()
    _write(
        pin_path(identity, store_id),
        {"version": PIN_VERSION, "place": store_id, "origin": origin.hex(), "check": mac},
    )


def refuse_known_store(identity: Identity, store_id: str, path: Path | None) -> None:
    """Check that this witness does not know an earlier ledger in a store where one is about to be created.

    Args:
        identity: the witness.
        store_id: `Ledger.store_id`.
        path: the witness's state file; without one the pin is checked.

    Raises:
        LedgerError: the witness knows an earlier ledger there.
    """
    state = load(identity, path) if path is not None else None
    pinned = pinned_origin(identity, store_id) if path is None else None
    origin = state.origin if state is not None else pinned
    if origin is not None:
        file = path or pin_path(identity, store_id)
        raise LedgerError(
            f"This store held the ledger with origin {origin.hex()[:16]}…, which is missing now. Restore it. "
            f"To create a new ledger instead, delete {file}.",
            field="ledger",
        )


def _folder() -> Path:
    return default_identity_path().parent / "witness"


def _lines_path(path: Path) -> Path:
    return path.with_name(path.name + ".lines")


def _past_path(path: Path) -> Path:
    return path.with_name(path.name + ".past")


def _state_mac(identity: Identity, state: WitnessState) -> bytes:
    text = f"{state.origin.hex()} {state.tree.size} {state.time} {state.tree.root().hex()}"
    return hmac.digest(identity.kit_key, b"mtlsign/v1/witness\n" + text.encode(), "sha256")


def _pin_mac(identity: Identity, store_id: str, origin: bytes) -> bytes:
    return hmac.digest(identity.kit_key, b"mtlsign/v1/place\n" + origin + store_id.encode(), "sha256")


def _hex(value: object) -> bytes:
    return require_hex(value, FIELD, 32)


def _damaged_error(path: Path) -> KeyMaterialError:
    return KeyMaterialError(f"{path} is damaged. Restore it from a copy.", field=FIELD)


def _read(path: Path, *names: str) -> dict[str, object] | None:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_STATE + 1)
    except FileNotFoundError:
        return None
    document = parse_strict_json(data, limit=MAX_STATE, where=FIELD)
    refuse_version_0(document, "version", where=FIELD, fix=f"Move {path} away. {PUBLISH_AGAIN}")
    return require_fields(document, FIELD, *names)


def _write(path: Path, fields: dict[str, Any]) -> None:
    atomic_write(path, (json.dumps(fields, indent=1) + "\n").encode())
