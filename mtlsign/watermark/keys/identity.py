"""Owner identity: an Ed25519 key that signs specs, and the key that encrypts owner kits, in one file.

The file format is in `docs/format.md`, section "Identity file". Only `save` writes the seed.
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
from mtlsign.storage.local import atomic_write
from mtlsign.storage.strict_json import parse_strict_json, require_fields, require_hex
from mtlsign.storage.versions import EMBED_AGAIN, refuse_version_0

VERSION = "mtlsign/identity/v1"
SCRYPT = {"n": 2**15, "r": 8, "p": 1}
_SEALED = "scrypt+chacha20poly1305"
_MAX_BYTES = 64 * 1024
_MAX_PASSPHRASE_BYTES = 1024
_NEW_IDENTITY = f"Move the file away and create a new identity. {EMBED_AGAIN}"


def length_prefixed(part: bytes) -> bytes:
    """Return the 8-byte big-endian length of `part`, then `part`."""
    return len(part).to_bytes(8, "big") + part


def _wrapping_cipher(passphrase: bytes, salt: bytes) -> ChaCha20Poly1305:
    return ChaCha20Poly1305(Scrypt(salt=salt, length=32, **SCRYPT).derive(passphrase))


class Identity:
    """Owner of watermarks: signs specs (Ed25519) and holds the key that encrypts owner kits.

    It cannot be pickled or copied, so that it is never sent to a Ray worker by accident.

    Args:
        seed: 32 secret bytes of the Ed25519 key.
        kit_key: 32 secret bytes.
    """

    __slots__ = ("_kit_key", "_private", "_public_key", "_seed")

    def __init__(self, seed: bytes, kit_key: bytes) -> None:
        if len(seed) != 32 or len(kit_key) != 32:
            raise KeyMaterialError(
                "Seed and kit key must have 32 bytes each. Use Identity.generate.", field="owner"
            )
        self._seed, self._kit_key = bytes(seed), bytes(kit_key)
        self._private = Ed25519PrivateKey.from_private_bytes(self._seed)
        self._public_key = self._private.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> Identity:
        """Return a new identity from the system's randomness."""
        return cls(secrets.token_bytes(32), secrets.token_bytes(32))

    @property
    def public_key(self) -> bytes:
        """Ed25519 public key, 32 bytes."""
        return self._public_key

    @property
    def kit_key(self) -> bytes:
        """Secret key of 32 bytes that encrypts owner kits."""
        return self._kit_key

    def sign(self, data: bytes) -> bytes:
        """Return the Ed25519 signature, 64 bytes."""
        return self._private.sign(data)

    def __repr__(self) -> str:
        """Return a representation with the public key only."""
        return f"Identity(public_key={self._public_key.hex()})"

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled."""
        raise TypeError("An Identity never leaves its process. Sign on the driver and send the KeyOpening.")

    def save(self, path: Path, passphrase: bytes | None) -> None:
        """Write a new file of mode 0600 atomically; a new folder has mode 0700.

        Raises:
            KeyMaterialError: the file exists already or cannot be written, or the passphrase is empty.
        """
        fields: dict[str, object] = {"version": VERSION, "public_key": self._public_key.hex()}
        secret = self._seed + self._kit_key
        if passphrase is None:
            fields |= {"protection": "none", "secret": secret.hex()}
        else:
            if not passphrase:
                raise KeyMaterialError(
                    "The passphrase is empty. Use at least one character.", field="passphrase"
                )
            salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
            sealed = _wrapping_cipher(passphrase, salt).encrypt(nonce, secret, _associated(self._public_key))
            fields |= {"protection": _SEALED, **SCRYPT}
            fields |= {"salt": salt.hex(), "nonce": nonce.hex(), "ciphertext": sealed.hex()}
        _write_new_file(Path(path), (json.dumps(fields, indent=1) + "\n").encode("ascii"))

    @classmethod
    def load(cls, path: Path, passphrase: bytes | None) -> Identity:
        """Read an identity file of at most 64 KiB.

        Raises:
            KeyMaterialError: the file is missing, damaged, or unprotected and readable by other users; or the
                passphrase is wrong.
        """
        data, mode = _read(Path(path), _MAX_BYTES, "owner")
        fields = parse_strict_json(data, limit=_MAX_BYTES, where="owner")
        refuse_version_0(fields, "version", where="owner", fix=_NEW_IDENTITY)
        if not isinstance(fields, dict) or fields.get("version") != VERSION:
            raise KeyMaterialError(f"{path} is not a {VERSION} file. Pass the identity file.", field="owner")
        if fields.get("protection") == "none":
            secret = _unprotected_secret(fields, mode, passphrase)
        else:
            secret = _decrypted_secret(fields, passphrase)
        identity = cls(secret[:32], secret[32:])
        if identity.public_key != require_hex(fields["public_key"], "owner.public_key", 32):
            raise KeyMaterialError(
                "The public key in the file is not that of its secret. Restore the file from a backup.",
                field="owner",
            )
        return identity


def _associated(public_key: bytes) -> bytes:
    return VERSION.encode("ascii") + length_prefixed(public_key)


def _unprotected_secret(fields: dict[str, object], mode: int, passphrase: bytes | None) -> bytes:
    require_fields(fields, "owner", "version", "public_key", "protection", "secret")
    if mode & 0o077:
        raise KeyMaterialError(
            "Other users can read the file, and it has no passphrase. Run chmod 600 on it.", field="owner"
        )
    if passphrase is not None:
        raise KeyMaterialError("This identity has no passphrase. Omit --passphrase-file.", field="passphrase")
    return require_hex(fields["secret"], "owner.secret", 64)


def _decrypted_secret(fields: dict[str, object], passphrase: bytes | None) -> bytes:
    require_fields(
        fields, "owner", "version", "public_key", "protection", "n", "r", "p", "salt", "nonce", "ciphertext"
    )
    cost = {name: fields[name] for name in SCRYPT}
    if fields["protection"] != _SEALED or cost != SCRYPT or any(type(c) is not int for c in cost.values()):
        raise KeyMaterialError(
            "The file has a protection that this version does not support. Update mtlsign.", field="owner"
        )
    public_key = require_hex(fields["public_key"], "owner.public_key", 32)
    salt = require_hex(fields["salt"], "owner.salt", 16)
    nonce = require_hex(fields["nonce"], "owner.nonce", 12)
    sealed = require_hex(fields["ciphertext"], "owner.ciphertext", 80)
    if passphrase is None:
        raise KeyMaterialError(
            "This identity needs a passphrase. Pass --passphrase-file.", field="passphrase"
        )
    try:
        return _wrapping_cipher(passphrase, salt).decrypt(nonce, sealed, _associated(public_key))
    except InvalidTag:
        raise KeyMaterialError(
            "The passphrase is wrong, or the identity file is damaged. Check --passphrase-file.",
            field="passphrase",
        ) from None


def _read(path: Path, limit: int, where: str) -> tuple[bytes, int]:
    """Return bytes and permission bits of a regular file."""
    try:
        # O_NONBLOCK, because opening a named pipe would otherwise block before it can be refused.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise KeyMaterialError(f"{path} is not a regular file. Pass a regular file.", field=where)
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise KeyMaterialError(
            f"{path} cannot be read ({reason}). Pass a readable file.", field=where
        ) from None
    if len(data) > limit:
        raise KeyMaterialError(f"{path} has over {limit} bytes. Pass the right file.", field=where)
    return data, stat.S_IMODE(status.st_mode)


def _write_new_file(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_write(path, data, exclusive=True, without_hard_links=True)
    except FileExistsError:
        raise KeyMaterialError(
            f"{path} exists already, and is never replaced: its kits open with no other identity. Pass it as "
            "--owner to use it, or choose another file.",
            field="owner",
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise KeyMaterialError(
            f"{path} cannot be written ({reason}). Choose a writable file.", field="owner"
        ) from None


def default_identity_path() -> Path:
    """Return `identity.json` in $MTLSIGN_HOME, $XDG_CONFIG_HOME/mtlsign or ~/.config/mtlsign."""
    if home := os.environ.get("MTLSIGN_HOME"):
        return Path(home) / "identity.json"
    if config := os.environ.get("XDG_CONFIG_HOME"):
        return Path(config) / "mtlsign" / "identity.json"
    try:
        return Path.home() / ".config" / "mtlsign" / "identity.json"
    except RuntimeError:
        raise KeyMaterialError(
            "There is no home folder. Set MTLSIGN_HOME or pass --owner.", field="owner"
        ) from None


def read_passphrase(path: Path) -> bytes:
    """Read at most 1,024 bytes, without one line break at the end.

    Raises:
        KeyMaterialError: the file is empty, too large, unreadable, or readable by other users.
    """
    data, mode = _read(Path(path), _MAX_PASSPHRASE_BYTES, "passphrase_file")
    if mode & 0o077:
        raise KeyMaterialError(f"Other users can read {path}. Run chmod 600 on it.", field="passphrase_file")
    passphrase = data.removesuffix(b"\n").removesuffix(b"\r")
    if not passphrase:
        raise KeyMaterialError(f"{path} is empty. Write a passphrase into it.", field="passphrase_file")
    return passphrase


def load_identity(owner: Path | None, passphrase_file: Path | None) -> tuple[Identity, Path]:
    """Return the identity and its file: `owner`, or the default one. Nothing is created.

    Raises:
        KeyMaterialError: there is no such file; see `Identity.load` and `read_passphrase`.
    """
    passphrase = None if passphrase_file is None else read_passphrase(passphrase_file)
    path = default_identity_path() if owner is None else Path(owner)
    if not path.exists():
        raise KeyMaterialError(
            f"There is no owner identity at {path}. Copy the owner's identity file to it, or pass --owner.",
            field="owner",
        )
    return Identity.load(path, passphrase), path


def load_or_create_identity(owner: Path | None, passphrase_file: Path | None) -> tuple[Identity, Path, bool]:
    """Return the identity, its file, and whether it was created now.

    A named `owner` file must exist, so that a mistyped path never creates a new owner. Without one, the
    default file is read, or created on the first call.

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
            if not path.exists():  # otherwise another process created it first
                raise
    return Identity.load(path, passphrase), path, False
