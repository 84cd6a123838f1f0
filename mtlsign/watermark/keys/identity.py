"""The owner's identity: an Ed25519 key that signs specs, and the key that encrypts owner kits, in one file.

Written format: `docs/format.md`, section "Identity file". The seed leaves an `Identity` only through `save`.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from pathlib import Path
from typing import NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from mtlsign.errors import KeyMaterialError
from mtlsign.storage.strict_json import parse_strict_json, require_fields, require_hex

VERSION = "mtlsign/identity/v0"
SCRYPT = {"n": 2**15, "r": 8, "p": 1}
_SEALED = "scrypt+chacha20poly1305"
_MAX_BYTES = 64 * 1024
_MAX_PASSPHRASE_BYTES = 1024


def length_prefixed(part: bytes) -> bytes:
    """Length-prefixed bytes: 8-byte big-endian length, then the bytes."""
    return len(part).to_bytes(8, "big") + part


def _wrapping_cipher(passphrase: bytes, salt: bytes) -> ChaCha20Poly1305:
    return ChaCha20Poly1305(Scrypt(salt=salt, length=32, **SCRYPT).derive(passphrase))


class Identity:
    """An owner: signs specs (Ed25519) and holds the key under which owner kits are encrypted.

    It cannot be pickled or copied, so it cannot travel to a Ray worker by accident.
    """

    __slots__ = ("_kit_key", "_private", "_public_key", "_seed")

    def __init__(self, seed: bytes, kit_key: bytes) -> None:
        """From 32 secret bytes each; use `generate` unless you restore a backup."""
        if len(seed) != 32 or len(kit_key) != 32:
            raise KeyMaterialError(
                "seed and kit key must be 32 bytes each; use Identity.generate", field="owner"
            )
        self._seed, self._kit_key = bytes(seed), bytes(kit_key)
        self._private = Ed25519PrivateKey.from_private_bytes(self._seed)
        self._public_key = self._private.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> Identity:
        """A fresh identity from the system's randomness."""
        return cls(secrets.token_bytes(32), secrets.token_bytes(32))

    @property
    def public_key(self) -> bytes:
        """Ed25519 public key, 32 bytes."""
        return self._public_key

    @property
    def kit_key(self) -> bytes:
        """Secret: 32 bytes under which owner kits are encrypted."""
        return self._kit_key

    def sign(self, data: bytes) -> bytes:
        """Ed25519 signature, 64 bytes."""
        return self._private.sign(data)

    def __repr__(self) -> str:
        """The public key only."""
        return f"Identity(public_key={self._public_key.hex()})"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled."""
        raise TypeError("an Identity never leaves its process; sign on the driver and send the KeyOpening")

    def save(self, path: Path, passphrase: bytes | None) -> None:
        """Write a new file of mode 0600 (its folder, when made here, 0700), whole or not at all.

        Raises:
            KeyMaterialError: the file exists already or cannot be written, or the passphrase is empty.
        """
        fields: dict[str, object] = {"version": VERSION, "public_key": self._public_key.hex()}
        secret = self._seed + self._kit_key
        if passphrase is None:
            fields |= {"protection": "none", "secret": secret.hex()}
        else:
            if not passphrase:
                raise KeyMaterialError("is empty; give at least one character", field="passphrase")
            salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
            sealed = _wrapping_cipher(passphrase, salt).encrypt(nonce, secret, _associated(self._public_key))
            fields |= {"protection": _SEALED, **SCRYPT}
            fields |= {"salt": salt.hex(), "nonce": nonce.hex(), "ciphertext": sealed.hex()}
        _write_exclusive(Path(path), (json.dumps(fields, indent=1) + "\n").encode("ascii"))

    @classmethod
    def load(cls, path: Path, passphrase: bytes | None) -> Identity:
        """Read an identity file of at most 64 KiB.

        Raises:
            KeyMaterialError: missing, damaged, readable by others though unprotected, or a wrong passphrase.
        """
        data, mode = _read(Path(path), _MAX_BYTES, "owner")
        got = parse_strict_json(data, limit=_MAX_BYTES, where="owner")
        if not isinstance(got, dict) or got.get("version") != VERSION:
            raise KeyMaterialError(f"is not a {VERSION} file; pass the identity file", field="owner")
        if got.get("protection") == "none":
            got = require_fields(got, "owner", "version", "public_key", "protection", "secret")
            if mode & 0o077:
                raise KeyMaterialError(
                    "is readable by others and has no passphrase; chmod 600 it", field="owner"
                )
            if passphrase is not None:
                raise KeyMaterialError(
                    "this identity has none; leave --passphrase-file out", field="passphrase"
                )
            secret = require_hex(got["secret"], "owner.secret", 64)
        else:
            secret = _unseal(got, passphrase)
        found = cls(secret[:32], secret[32:])
        if found.public_key != require_hex(got["public_key"], "owner.public_key", 32):
            raise KeyMaterialError(
                "holds another's public key; restore the file from a backup", field="owner"
            )
        return found


def _associated(public_key: bytes) -> bytes:
    return VERSION.encode("ascii") + length_prefixed(public_key)


def _unseal(got: dict[str, object], passphrase: bytes | None) -> bytes:
    require_fields(
        got, "owner", "version", "public_key", "protection", "n", "r", "p", "salt", "nonce", "ciphertext"
    )
    cost = {name: got[name] for name in SCRYPT}
    if got["protection"] != _SEALED or cost != SCRYPT or any(type(c) is not int for c in cost.values()):
        raise KeyMaterialError("names a protection this version does not know; update mtlsign", field="owner")
    public_key = require_hex(got["public_key"], "owner.public_key", 32)
    salt = require_hex(got["salt"], "owner.salt", 16)
    nonce = require_hex(got["nonce"], "owner.nonce", 12)
    sealed = require_hex(got["ciphertext"], "owner.ciphertext", 80)
    if passphrase is None:
        raise KeyMaterialError("this identity needs one; give --passphrase-file", field="passphrase")
    try:
        return _wrapping_cipher(passphrase, salt).decrypt(nonce, sealed, _associated(public_key))
    except InvalidTag:
        raise KeyMaterialError(
            "is wrong, or the identity file is damaged; check --passphrase-file", field="passphrase"
        ) from None


def _read(path: Path, limit: int, where: str) -> tuple[bytes, int]:
    """Bytes and permission bits of a regular file."""
    try:
        # O_NONBLOCK: a named pipe must not hang us before it is refused
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise KeyMaterialError(f"{path} is not a file; pass a regular file", field=where)
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise KeyMaterialError(f"{path}: {reason}; pass a file you can read", field=where) from None
    if len(data) > limit:
        raise KeyMaterialError(f"{path} is over {limit} bytes; pass the right file", field=where)
    return data, stat.S_IMODE(status.st_mode)


def _write_exclusive(path: Path, data: bytes) -> None:
    """Create `path` with all of `data`, or nothing; a concurrent reader never sees half of it."""
    part = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with os.fdopen(
                os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb"
            ) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(part, path)  # unlike a rename, never replaces an existing file
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except FileExistsError:
        raise KeyMaterialError(
            f"{path} exists; choose another file or delete it yourself", field="owner"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise KeyMaterialError(f"{path}: {reason}; choose a file you can write", field="owner") from None


def default_identity_path() -> Path:
    """`identity.json` in $MTLSIGN_HOME, $XDG_CONFIG_HOME/mtlsign or ~/.config/mtlsign."""
    if home := os.environ.get("MTLSIGN_HOME"):
        return Path(home) / "identity.json"
    if config := os.environ.get("XDG_CONFIG_HOME"):
        return Path(config) / "mtlsign" / "identity.json"
    try:
        return Path.home() / ".config" / "mtlsign" / "identity.json"
    except RuntimeError:
        raise KeyMaterialError(
            "there is no home folder; set MTLSIGN_HOME or pass --owner", field="owner"
        ) from None


def read_passphrase(path: Path) -> bytes:
    """At most 1,024 bytes, without one line break at the end; KeyMaterialError when empty or unreadable."""
    data, _ = _read(Path(path), _MAX_PASSPHRASE_BYTES, "passphrase_file")
    passphrase = data.removesuffix(b"\n").removesuffix(b"\r")
    if not passphrase:
        raise KeyMaterialError(f"{path} is empty; write a passphrase into it", field="passphrase_file")
    return passphrase


def load_or_create_identity(owner: Path | None, passphrase_file: Path | None) -> tuple[Identity, Path, bool]:
    """The identity, its file, and whether it was made now.

    A named `owner` file must exist: a mistyped path never makes a new owner. Without one, the default file is
    read, or made on the first call.

    Raises:
        KeyMaterialError: see `Identity.load`, `Identity.save` and `read_passphrase`.
    """
    passphrase = None if passphrase_file is None else read_passphrase(passphrase_file)
    if owner is not None:
        return Identity.load(owner, passphrase), Path(owner), False
    path = default_identity_path()
    if not path.exists():
        identity = Identity.generate()
        try:
            identity.save(path, passphrase)
            return identity, path, True
        except KeyMaterialError:
            if not path.exists():  # otherwise another process was faster: take its identity
                raise
    return Identity.load(path, passphrase), path, False
