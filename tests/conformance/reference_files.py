"""Second reader of kits, folders and bundles, written from docs/format.md and docs/claims.md alone.

It uses Python's standard library and `cryptography`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import zipfile
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tests.conformance.reference_claim_verifier import from_path, leaf

MAGIC, KIT_MAGIC, PURPOSE = b"MTLS\x00v1\n", b"mtlsign/kit/v1\n", "mtlsign/v1/kit"


def decrypt_kit(sealed: bytes, secret: bytes) -> list[bytes]:
    """Return the parts of a kit: opening, info, reference, W0, and the head if there is one.

    Args:
        sealed: bytes of `kit.sealed`.
        secret: kit key or passphrase, as the header names it.
    """
    assert sealed.startswith(MAGIC)
    end = len(MAGIC) + 4 + int.from_bytes(sealed[len(MAGIC) : len(MAGIC) + 4], "big")
    header = json.loads(sealed[len(MAGIC) + 4 : end])
    assert header["cipher"] == "chacha20poly1305" and header["purpose"] == PURPOSE
    salt = bytes.fromhex(header["salt"])
    if header["kdf"] == "hkdf-sha256":
        key = HKDF(hashes.SHA256(), 32, salt, PURPOSE.encode()).derive(secret)
    else:
        assert header["kdf"] == "scrypt"
        costs = {name: header[name] for name in ("n", "r", "p")}
        key = hashlib.scrypt(secret, salt=salt, **costs, maxmem=2**26, dklen=32)
    plain = ChaCha20Poly1305(key).decrypt(bytes.fromhex(header["nonce"]), sealed[end:], sealed[:end])
    assert plain.startswith(KIT_MAGIC)
    parts, start = [], len(KIT_MAGIC)
    while start < len(plain):
        size = int.from_bytes(plain[start : start + 8], "big")
        parts.append(plain[start + 8 : start + 8 + size])
        start += 8 + size
    return parts


def read_folder(files: dict[str, bytes]) -> list[str]:
    """Return the names that a folder's manifest lists, after a check of each file."""
    manifest = json.loads(files["manifest.json"])
    assert manifest["format"] == "mtlsign/folder/v1"
    for entry in manifest["files"]:
        data = files[entry["name"]]
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["size"], entry["sha256"])
    names = [str(entry["name"]) for entry in manifest["files"]]
    assert names == sorted(names)
    written = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    assert written == files["manifest.json"]
    return names


def read_bundle(data: bytes) -> dict[str, Any]:
    """Return the claim's index, size and root of the newest checkpoint, proven entries, and blobs."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(members["bundle.json"])
    assert header.keys() == {"format", "claim"} and header["format"] == "mtlsign/bundle/v1"
    origin, size, root = members["head"].decode().split("\n")[:3]
    entries = []
    for name, path in members.items():
        if name.startswith("entries/") and name.endswith(".path"):
            index = int(name.removeprefix("entries/").removesuffix(".path"))
            steps = [path[at : at + 32] for at in range(0, len(path), 32)]
            entry = members[f"entries/{index}"]
            assert from_path(leaf(entry), index, int(size), steps).hex() == _hex(root)
            entries.append(index)
    blobs = sorted(name.removeprefix("blobs/") for name in members if name.startswith("blobs/"))
    assert all(hashlib.sha256(members[f"blobs/{blob}"]).hexdigest() == blob for blob in blobs)
    return {
        "claim": header["claim"], "origin": origin.removeprefix("mtlsign/ledger/v1/"), "size": int(size),
        "root": _hex(root), "entries": sorted(entries), "blobs": blobs,
    }  # fmt: skip


def _hex(text: str) -> str:
    return base64.b64decode(text, validate=True).hex()
