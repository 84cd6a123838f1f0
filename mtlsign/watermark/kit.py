"""Owner kit: the encrypted file with which an owner verifies or claims one watermark."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

import torch

from mtlsign.config.attack import AttackSettings
from mtlsign.config.trace import TraceSettings
from mtlsign.config.verify import VerifySettings
from mtlsign.errors import (
    ArtifactError,
    KeyMaterialError,
    MissingArtifactError,
    ModelError,
    OldArtifactError,
)
from mtlsign.models.factories import trusted_factories
from mtlsign.models.families import custom
from mtlsign.storage.base import Storage
from mtlsign.storage.json_io import JSON_LIMIT, read_json_object, serialize_json_object
from mtlsign.storage.locations import has_suffix, open_file, open_storage
from mtlsign.storage.manifest import read_manifest, read_manifest_folder, write_manifest_folder
from mtlsign.storage.model_folder import KITS, read_model
from mtlsign.storage.safetensors_io import parse_safetensors
from mtlsign.watermark.keys.identity import (
    default_identity_path,
    load_identity,
    read_passphrase,
)
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.keys.sealing import (
    PLAINTEXT_LIMIT,
    EncryptionSecret,
    decrypt_envelope,
    encrypt_envelope,
)
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference
from mtlsign.watermark.verification.verdict import Verdict

KIT_FILE, OWNER_FILE = "kit.sealed", "owner.json"
KIT_PURPOSE = "mtlsign/v1/kit"
_KIT_MAGIC = b"mtlsign/kit/v1\n"
_LENGTH_BYTES = 8
#: Opening, info, reference and base weights, and the head if it is free.
_PART_COUNTS = (4, 5)
_ENVELOPE_OVERHEAD = 2048
_OWNER_LIMIT = 4096
_PUBLIC_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class OwnerKit:
    """Everything the owner needs to verify or claim one watermark. SECRET; `repr` hides it.

    Attributes:
        opening: the key as (spec, public key, signature).
        reference: bytes of W0's reference.
        base_weights: safetensors bytes of W0: of all of it with a spread head, else of the tapped part.
        head: safetensors bytes of a free head, None for the keyed head.
        info: JSON object of the owner's notes: model_digest, task, created, versions, …
    """

    opening: KeyOpening = field(repr=False)
    reference: bytes = field(repr=False)
    base_weights: bytes = field(repr=False)
    head: bytes | None = field(repr=False)
    info: dict[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        return "OwnerKit(hidden)"


def write_kit(storage: Storage, kit: OwnerKit, secret: EncryptionSecret) -> str:
    """Encrypt the kit and write `kits/<id>/` below `storage`.

    The id is the first 16 hex digits of SHA-256 over the sealed bytes. Their salt and nonce are random, so
    the id reveals nothing about the key, and writing a kit a second time gives a second folder.

    Args:
        storage: where to write.
        kit: the kit.
        secret: the owner's encryption secret.

    Returns:
        The id.

    Raises:
        KeyMaterialError: the kit has over 2 GiB.
        ArtifactError: `info` cannot be written as JSON.
        StorageError: the storage cannot be written.
    """
    parts = [kit.opening.to_json().encode(), serialize_json_object(kit.info), kit.reference, kit.base_weights]
    parts += [] if kit.head is None else [kit.head]
    plaintext = _KIT_MAGIC + b"".join(len(part).to_bytes(_LENGTH_BYTES, "big") + part for part in parts)
    sealed = encrypt_envelope(plaintext, secret, purpose=KIT_PURPOSE)
    kit_id = hashlib.sha256(sealed).hexdigest()[:16]
    folder = storage.child(KITS, private=True).child(kit_id)
    owner = serialize_json_object({"public_key": kit.opening.public_key.hex()})
    write_manifest_folder(folder, {KIT_FILE: sealed, OWNER_FILE: owner}, replace_uncommitted=False)
    return kit_id


def read_kit(location: str, secret: EncryptionSecret, *, endpoint: str | None = None) -> OwnerKit:
    """Decrypt an untrusted kit folder or `.sealed` file of at most 2 GiB.

    The opening's signature is not checked here, but by `KeyOpening.key`.

    Args:
        location: folder or file, local or on S3.
        secret: the owner's encryption secret.
        endpoint: S3 endpoint.

    Raises:
        KeyMaterialError: the secret is wrong, or the kit is damaged.
        ArtifactError, StorageError: the kit cannot be fetched.
    """
    limit = PLAINTEXT_LIMIT + _ENVELOPE_OVERHEAD
    if has_suffix(location, ".sealed"):
        storage, name = open_file(location, endpoint=endpoint)
        sealed = storage.read(name, limit)
    else:
        storage = open_storage(location, endpoint=endpoint)
        try:
            files = read_manifest_folder(storage, file_limit=limit)
        except OldArtifactError:
            raise
        except MissingArtifactError as error:
            raise MissingArtifactError(error.detail, field="kit") from None
        except ArtifactError as error:
            raise ArtifactError(f"{error.detail} Or pass its {KIT_FILE} alone.", field="kit") from None
        if KIT_FILE not in files:
            raise ArtifactError(f"{storage.uri} lacks {KIT_FILE}. Pass the folder of a kit.", field="kit")
        sealed = files[KIT_FILE]
    return _parse_kit(decrypt_envelope(sealed, secret, purpose=KIT_PURPOSE))


def open_kit(settings: VerifySettings | AttackSettings | TraceSettings, location: str) -> OwnerKit:
    """Decrypt a kit with the passphrase or the owner identity that the settings name.

    Raises:
        KeyMaterialError: the secret is wrong, or the kit is damaged.
        ArtifactError, StorageError: the kit cannot be fetched.
    """
    if settings.kit_passphrase_file is not None:
        secret = EncryptionSecret.from_passphrase(read_passphrase(settings.kit_passphrase_file))
        return read_kit(location, secret, endpoint=settings.endpoint)
    owner, path = kit_owner(location, endpoint=settings.endpoint), settings.owner or default_identity_path()
    if owner is not None and not path.exists():
        raise KeyMaterialError(
            f"The kit belongs to identity {owner}, and there is no identity at {path}. "
            "Copy the identity file of the kit's owner there, or pass --owner.",
            field="owner",
        )
    identity, _ = load_identity(settings.owner, settings.passphrase_file)
    require_kit_owner(location, identity.public_key, endpoint=settings.endpoint)
    secret = EncryptionSecret.from_kit_key(identity.kit_key)
    return read_kit(location, secret, endpoint=settings.endpoint)


def require_kit_owner(location: str, public_key: bytes, *, endpoint: str | None = None) -> None:
    """Raise `KeyMaterialError` if the kit's folder names another owner, whose identity alone opens the kit.

    Args:
        location: folder or file, local or on S3.
        public_key: public key of the identity at hand.
        endpoint: S3 endpoint.
    """
    owner = kit_owner(location, endpoint=endpoint)
    if owner is not None and owner != public_key.hex():
        raise KeyMaterialError(
            f"The kit belongs to identity {owner}, not to {public_key.hex()}. "
            "Pass the identity file of the kit's owner as --owner.",
            field="owner",
        )


def kit_owner(location: str, *, endpoint: str | None = None) -> str | None:
    """Return the public key of a kit's owner (64 hex) from the kit's folder; None if it is not stored there.

    It is not authenticated and serves messages only.

    Raises:
        OldArtifactError: the folder has version 0 of the format.
        StorageError: the storage cannot be read.
    """
    if has_suffix(location, ".sealed"):
        storage = open_file(location, endpoint=endpoint)[0]
    else:
        storage = open_storage(location, endpoint=endpoint)
        _refuse_old_folder(storage)
    try:
        owner = read_json_object(storage.read(OWNER_FILE, _OWNER_LIMIT), OWNER_FILE).get("public_key")
    except ArtifactError:
        return None
    return owner if isinstance(owner, str) and _PUBLIC_KEY.fullmatch(owner) else None


def _refuse_old_folder(storage: Storage) -> None:
    """Raise `OldArtifactError` for a folder of version 0, whose owner's identity is refused as well."""
    try:
        read_manifest(storage)
    except OldArtifactError:
        raise
    except ArtifactError:
        pass  # reported when the kit is read


def detector_for_kit(
    kit: OwnerKit, factory: str | None = None, *, device: torch.device | str = "cpu"
) -> WatermarkDetector:
    """Build the detector of a kit.

    A custom architecture is imported only if the caller names it, because a kit may be untrusted.

    Args:
        kit: the kit.
        factory: `package.module:function` that the caller trusts to build the kit's custom architecture,
            whatever its name in the kit.
        device: where scores are computed.

    Raises:
        ModelError: the spec needs a custom architecture, and no factory is given.
    """
    path = custom.factory_path(str(kit.opening.parse().architecture["arch"]))
    if path is not None and not factory:
        raise ModelError(
            f"The kit is for the custom architecture {path!r}. Pass --trusted-factory with a function that "
            f"builds it and whose code you trust, package.module:function (such as {path}).",
            field="trusted-factory",
        )
    factories = {} if path is None else {path: next(iter(trusted_factories(factory).values()))}
    reference = Reference.from_bytes(kit.reference)
    return WatermarkDetector(kit.opening, reference, head=kit.head, device=device, factories=factories)


def verify_with_kit(settings: VerifySettings) -> list[Verdict]:
    """Verify models with a kit; return a verdict for each model, in order.

    Raises:
        KeyMaterialError: the kit does not open.
        ArtifactError, ModelError, StorageError: a model cannot be fetched.
    """
    kit = open_kit(settings, settings.kit)
    detector = detector_for_kit(kit, settings.trusted_factory)
    base_weights = parse_safetensors(kit.base_weights)
    verdicts = []
    for location in settings.models:
        model = read_model(location, endpoint=settings.endpoint)
        verdicts.append(
            verify(
                model.tensors,
                detector,
                bits=settings.min_evidence_bits,
                gamma=settings.gamma,
                controls=settings.control_keys,
                base_weights=base_weights,
                model_digest=model.digest,
            )
        )
    return verdicts


def _parse_kit(data: bytes) -> OwnerKit:
    damaged = KeyMaterialError(
        "The kit's content is damaged or from another version. Use another copy.", field="kit"
    )
    if not data.startswith(_KIT_MAGIC):
        raise damaged
    parts: list[bytes] = []
    start = len(_KIT_MAGIC)
    while start < len(data) and len(parts) <= max(_PART_COUNTS):
        content = start + _LENGTH_BYTES
        size = int.from_bytes(data[start:content], "big")
        part = data[content : content + size]
        if len(data) < content or len(part) != size:
            raise damaged
        parts.append(part)
        start = content + size
    if len(parts) not in _PART_COUNTS or len(parts[0]) > JSON_LIMIT:
        raise damaged
    try:
        opening = KeyOpening.from_json(parts[0])
        info = read_json_object(parts[1], "kit info")
    except ArtifactError:
        raise damaged from None
    return OwnerKit(
        opening=opening,
        reference=parts[2],
        base_weights=parts[3],
        head=parts[4] if len(parts) == max(_PART_COUNTS) else None,
        info=info,
    )
