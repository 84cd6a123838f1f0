"""Keys of the service: they sign verdicts (DSSE, in-toto statements) and encrypt opened keys at rest.

The current identity signs and encrypts. Previous identities still decrypt what they encrypted and stay
listed, so that verdicts signed before a rotation can be checked. Keys are never part of an image or a log.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtlsign.claims.statements.envelope import open_envelope, sign
from mtlsign.claims.statements.types import PREDICATE, STATEMENT
from mtlsign.config.service import ServiceSettings
from mtlsign.errors import ClaimError, KeyMaterialError, MTLSignError, OldVersionError
from mtlsign.storage.versions import refuse_version_0
from mtlsign.watermark.keys.identity import Identity, read_passphrase
from mtlsign.watermark.keys.sealing import EncryptionSecret, decrypt_envelope, encrypt_envelope

PURPOSE = "mtlsign/v1/service/request"
PREDICATE_TYPE = PREDICATE + "verdict"
_INTEGERS = ("matches", "n", "near_zero")


class ServiceKeys:
    """Current identity of the service, and its previous identities, the newest first."""

    def __init__(self, current: Identity, previous: Sequence[Identity] = ()) -> None:
        self.current, self.previous = current, tuple(previous)

    @classmethod
    def load(cls, settings: ServiceSettings) -> ServiceKeys:
        """Load the identities from the environment or files. Without either, create one in the state folder.

        Raises:
            KeyMaterialError: an identity is damaged, or the passphrase is wrong.
        """
        passphrase = read_passphrase(settings.passphrase_file) if settings.passphrase_file else None
        previous = [Identity.load(Path(path), passphrase) for path in settings.previous_identities]
        if settings.signing_key is not None and settings.identity is None:
            try:
                raw = bytes.fromhex(settings.signing_key.get_secret_value())
            except ValueError:
                message = "The signing key is not hexadecimal. Set MTLSIGN_SIGNING_KEY to 128 hex digits."
                raise KeyMaterialError(message, field="signing-key") from None
            return cls(Identity(raw[:32], raw[32:]), previous)
        path = settings.identity or settings.state_dir / "identity.json"
        if settings.identity is None and not path.exists():
            try:
                Identity.generate().save(path, passphrase)
            except KeyMaterialError:
                if not path.exists():  # otherwise another process has created it
                    raise
        return cls(Identity.load(path, passphrase), previous)

    def encrypt(self, data: bytes) -> bytes:
        """Encrypt data that contains opened keys."""
        return encrypt_envelope(data, EncryptionSecret.from_kit_key(self.current.kit_key), purpose=PURPOSE)

    def decrypt(self, data: bytes) -> bytes:
        """Decrypt with the current or a previous key. Raises KeyMaterialError."""
        last: MTLSignError | None = None
        for identity in (self.current, *self.previous):
            secret = EncryptionSecret.from_kit_key(identity.kit_key)
            try:
                return decrypt_envelope(data, secret, purpose=PURPOSE)
            except KeyMaterialError as error:
                last = error
        assert last is not None
        raise last

    def public_keys(self) -> list[dict[str, Any]]:
        """Return the public keys, the current one first."""
        return [
            {"public_key": identity.public_key.hex(), "current": i == 0}
            for i, identity in enumerate((self.current, *self.previous))
        ]

    def sign(self, outcome: dict[str, Any], name: str, time: int) -> bytes:
        """Return the signed envelope of a verdict. All numbers are integers, so that readers agree on them.

        Args:
            outcome: outcome of the claim.
            name: id of the result.
            time: seconds since the epoch.
        """
        verdict = outcome["verdict"]
        predicate = {
            "signer": self.current.public_key.hex(),
            "time": time,
            "id": name,
            "key": outcome["key"],
            "claim": outcome.get("claim") if outcome.get("bound") else None,
            "status": verdict["status"],
            **{field: int(verdict[field]) for field in _INTEGERS},
            "millibits": int(min(1000 * (verdict["evidence_bits"] or 0), 10**9)),
            "millibits_required": int(1000 * verdict["bits_required"]),
            "statistic": verdict["statistic"],
            "reason": str(verdict["reason"] or "")[:300],
        }
        statement = {
            "_type": STATEMENT,
            "subject": [{"name": "suspect", "digest": {"sha256": verdict["model_digest"]}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": predicate,
        }
        return sign(json.dumps(statement, separators=(",", ":")).encode(), self.current)


def read_verdict(envelope: bytes, *, trusted: Sequence[str] = ()) -> dict[str, Any]:
    """Check the signature of a verdict; return {"suspect": digest, … fields of the predicate}.

    Args:
        envelope: the bytes of `GET /v1/verdicts/{id}`.
        trusted: trusted public keys (hex). If empty, any key is accepted and the caller must check "signer".

    Raises:
        ClaimError: the envelope is not a verdict, its signature is invalid, or its signer is not trusted.
    """
    opened = open_envelope(envelope)
    try:
        statement = json.loads(opened.payload)
        refuse_version_0(statement, "predicateType", where="verdict", fix="Verify the model again.")
        predicate, suspect = statement["predicate"], statement["subject"][0]["digest"]["sha256"]
        if statement["predicateType"] != PREDICATE_TYPE or [predicate["signer"]] != [
            key.hex() for key in opened.signers
        ]:
            raise ValueError
    except OldVersionError as error:
        raise ClaimError(error.detail, field=error.field) from None
    except (ValueError, KeyError, TypeError, IndexError):
        message = "The envelope is not a verdict of a service. Pass the bytes as they were downloaded."
        raise ClaimError(message, field="verdict") from None
    if trusted and predicate["signer"] not in trusted:
        message = "The signer is not one of the trusted keys. Pass the keys of the service that you trust."
        raise ClaimError(message, field="verdict")
    return {"suspect": suspect, **predicate}
