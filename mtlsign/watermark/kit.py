"""What an owner does with a kit: check models against it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch

from mtlsign.config.attack import AttackSettings
from mtlsign.config.verify import VerifySettings
from mtlsign.errors import ArtifactError, KeyMaterialError, ModelError
from mtlsign.models.factories import load_factory
from mtlsign.storage.base import Storage
from mtlsign.storage.locations import open_file, open_storage
from mtlsign.storage.manifest import read_manifest_folder, write_manifest_folder
from mtlsign.storage.model_folder import JSON_LIMIT, KITS, is_single_file, json_bytes, json_object, read_model
from mtlsign.storage.safetensors_io import parse_safetensors
from mtlsign.watermark.keys.identity import load_or_create_identity, read_passphrase
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.keys.sealing import (
    PLAINTEXT_LIMIT,
    EncryptionSecret,
    decrypt_envelope,
    encrypt_envelope,
)
from mtlsign.watermark.verification.detector import Verdict, WatermarkDetector, verify
from mtlsign.watermark.verification.reference import Reference


def open_kit(settings: VerifySettings | AttackSettings, place: str) -> OwnerKit:
    """Open a kit with the passphrase or owner identity that the settings name.

    Raises:
        KeyMaterialError: the kit does not open. ArtifactError, StorageError: it cannot be fetched.
    """
    if settings.kit_passphrase_file is not None:
        secret = EncryptionSecret.from_passphrase(read_passphrase(settings.kit_passphrase_file))
    else:
        secret = EncryptionSecret.from_kit_key(
            load_or_create_identity(settings.owner, settings.passphrase_file)[0].kit_key
        )
    return read_kit(place, secret, endpoint=settings.endpoint)


def detector_for_kit(
    kit: OwnerKit, factory: str | None = None, *, device: torch.device | str = "cpu"
) -> WatermarkDetector:
    """The kit's test. An own architecture is imported only if the caller names it: a kit may come from
    anybody.

    Raises:
        ModelError: the spec wants an architecture beyond the allow-list, and `factory` is not it.
    """
    factories = {factory: load_factory(factory)} if factory else {}
    arch = str(kit.opening.parse().graph["arch"])
    if arch.startswith("own/") and arch[4:] not in factories:
        raise ModelError(
            f"the kit is for an own architecture; if you trust that code: --factory {arch[4:]}",
            field="factory",
        )
    reference = Reference.from_bytes(kit.reference)
    return WatermarkDetector(kit.opening, reference, head=kit.head, device=device, factories=factories)


def verify_with_kit(settings: VerifySettings) -> list[Verdict]:
    """A verdict for each model, in order.

    Raises:
        KeyMaterialError: the kit does not open. ArtifactError, ModelError, StorageError: a model cannot be
        fetched.
    """
    kit = open_kit(settings, settings.kit)
    detector, base_weights = detector_for_kit(kit, settings.factory), parse_safetensors(kit.base_weights)
    verdicts = []
    for place in settings.models:
        model = read_model(place, endpoint=settings.endpoint)
        verdicts.append(
            verify(
                model.tensors,
                detector,
                bits=settings.bits,
                gamma=settings.gamma,
                controls=settings.controls,
                base_weights=base_weights,
                model_digest=model.digest,
            )
        )
    return verdicts


KIT_FILE = "kit.sealed"
KIT_PURPOSE = "mtlsign/v0/kit"


_KIT_MAGIC = b"mtlsign/kit/v0\n"


@dataclass(frozen=True)
class OwnerKit:
    """Everything the owner needs to verify or claim one mark. SECRET; never shown by `repr`.

    Attributes:
        opening: the key as (spec, public key, signature).
        reference: `reference`'s bytes, what is kept of W0's frame.
        w0: safetensors bytes of the tapped part of W0.
        head: safetensors bytes of a free head, None for the keyed head.
        info: JSON object with what the owner wants to find again: model_digest, task, created, versions, …
    """

    opening: KeyOpening = field(repr=False)
    reference: bytes = field(repr=False)
    base_weights: bytes = field(repr=False)
    head: bytes | None = field(repr=False)
    info: dict[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        return "Kit(hidden)"


def write_kit(storage: Storage, kit: OwnerKit, secret: EncryptionSecret) -> str:
    """Seal the kit and write `kits/<id>/` below `storage`; returns the id.

    The id is the first 16 hex of SHA-256 over the sealed bytes. Their salt and nonce are random, so it says
    nothing about the key, and writing a kit again makes another folder.

    Raises: KeyMaterialError when it is over 2 GiB; ArtifactError when `info` is no JSON; StorageError.
    """
    parts = [kit.opening.to_json().encode(), json_bytes(kit.info), kit.reference, kit.base_weights]
    parts += [] if kit.head is None else [kit.head]
    plaintext = _KIT_MAGIC + b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    sealed = encrypt_envelope(plaintext, secret, purpose=KIT_PURPOSE)
    kit_id = hashlib.sha256(sealed).hexdigest()[:16]
    write_manifest_folder(storage.child(f"{KITS}/{kit_id}"), {KIT_FILE: sealed})
    return kit_id


def read_kit(location: str, secret: EncryptionSecret, *, endpoint: str | None = None) -> OwnerKit:
    """Open a kit folder, or one `.sealed` file, from anywhere (at most 2 GiB).

    The opening's signature is checked when its `key()` is asked for, not here.

    Raises: KeyMaterialError for the wrong secret or a damaged kit; ArtifactError, StorageError otherwise.
    """
    limit = PLAINTEXT_LIMIT + 2048
    if is_single_file(location, ".sealed"):
        storage, name = open_file(location, endpoint=endpoint)
        sealed = storage.read(name, limit)
    else:
        storage = open_storage(location, endpoint=endpoint)
        sealed = read_manifest_folder(storage, file_limit=limit, names=(KIT_FILE,))[KIT_FILE]
    return _parse_kit(decrypt_envelope(sealed, secret, purpose=KIT_PURPOSE))


def _parse_kit(data: bytes) -> OwnerKit:
    damaged = KeyMaterialError(
        "the kit's content is damaged or from another version; take another copy", field="kit"
    )
    if not data.startswith(_KIT_MAGIC):
        raise damaged
    parts: list[bytes] = []
    start = len(_KIT_MAGIC)
    while start < len(data) and len(parts) <= 5:
        size = int.from_bytes(data[start : start + 8], "big")
        part = data[start + 8 : start + 8 + size]
        if len(data) < start + 8 or len(part) != size:
            raise damaged
        parts.append(part)
        start += 8 + size
    if len(parts) not in (4, 5) or len(parts[0]) > JSON_LIMIT:
        raise damaged
    try:
        opening = KeyOpening.from_json(parts[0])
        info = json_object(parts[1], "kit info")
    except ArtifactError:
        raise damaged from None
    return OwnerKit(opening, parts[2], parts[3], parts[4] if len(parts) == 5 else None, info)
