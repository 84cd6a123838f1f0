"""The service's keys: verdicts go out as DSSE envelopes of in-toto statements, opened keys lie sealed.

One identity signs and seals now; former ones still open what they sealed and stay listed, so that a verdict
signed before a rotation can still be checked. No key is ever part of an image or of a log.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtlsign.claims.statements.envelope import open_envelope, sign
from mtlsign.claims.statements.types import PREDICATE, STATEMENT
from mtlsign.config.service import ServiceSettings
from mtlsign.errors import ClaimError, KeyMaterialError, MTLSignError
from mtlsign.watermark.keys.identity import Identity, read_passphrase
from mtlsign.watermark.keys.sealing import EncryptionSecret, decrypt_envelope, encrypt_envelope

PURPOSE = "mtlsign/v0/service/request"
KIND = PREDICATE + "verdict"
_INTS = ("matches", "n", "near_zero")


class Keys:
    """The current identity, and former ones by age."""

    def __init__(self, current: Identity, former: Sequence[Identity] = ()) -> None:
        self.current, self.former = current, tuple(former)

    @classmethod
    def load(cls, settings: ServiceSettings) -> Keys:
        """From environment or files; without either, an identity is made in the state folder.

        Raises: KeyMaterialError.
        """
        passphrase = read_passphrase(settings.passphrase_file) if settings.passphrase_file else None
        former = [Identity.load(Path(p.strip()), passphrase) for p in settings.former.split(",") if p.strip()]
        if settings.signing_key is not None and settings.identity is None:
            try:
                raw = bytes.fromhex(settings.signing_key.get_secret_value())
            except ValueError:
                raise KeyMaterialError("must be 128 hexadecimal digits", field="signing-key") from None
            return cls(Identity(raw[:32], raw[32:]), former)
        path = settings.identity or settings.state / "identity.json"
        if settings.identity is None and not path.exists():
            try:
                Identity.generate().save(path, passphrase)
            except KeyMaterialError:
                if not path.exists():  # otherwise another process was faster
                    raise
        return cls(Identity.load(path, passphrase), former)

    def seal(self, data: bytes) -> bytes:
        """Encrypt what holds opened keys."""
        return encrypt_envelope(data, EncryptionSecret.from_kit_key(self.current.kit_key), purpose=PURPOSE)

    def unseal(self, data: bytes) -> bytes:
        """Decrypt it, also when it was sealed under a former key. Raises KeyMaterialError."""
        last: MTLSignError | None = None
        for identity in (self.current, *self.former):
            try:
                return decrypt_envelope(
                    data, EncryptionSecret.from_kit_key(identity.kit_key), purpose=PURPOSE
                )
            except KeyMaterialError as error:
                last = error
        assert last is not None
        raise last

    def public(self) -> list[dict[str, Any]]:
        """Public halves, the current one first."""
        return [
            {"public_key": one.public_key.hex(), "current": i == 0}
            for i, one in enumerate((self.current, *self.former))
        ]

    def sign(self, outcome: dict[str, Any], name: str, time: int) -> bytes:
        """The signed envelope of one verdict: integers only, so that every reader reads the same."""
        verdict = outcome["verdict"]
        predicate = {
            "signer": self.current.public_key.hex(),
            "time": time,
            "id": name,
            "key": outcome["key"],
            "claim": outcome.get("claim") if outcome.get("bound") else None,
            "status": verdict["status"],
            **{field: int(verdict[field]) for field in _INTS},
            "millibits": int(min(1000 * (verdict["evidence_bits"] or 0), 10**9)),
            "millibits_required": int(1000 * verdict["bits_required"]),
            "statistic": verdict["statistic"],
            "reason": str(verdict["reason"] or "")[:300],
        }
        whole = {
            "_type": STATEMENT,
            "subject": [{"name": "suspect", "digest": {"sha256": verdict["model_digest"]}}],
            "predicateType": KIND,
            "predicate": predicate,
        }
        return sign(json.dumps(whole, separators=(",", ":")).encode(), self.current)


def read_verdict(envelope: bytes, *, trusted: Sequence[str] = ()) -> dict[str, Any]:
    """What a signed verdict says, its signature checked: {"suspect": digest, …the predicate's fields}.

    Args:
        envelope: the bytes of `GET /v1/verdicts/{id}`.
        trusted: public keys (hex) that one trusts; empty: any, look at "signer" yourself.

    Raises:
        ClaimError: it is no verdict, the signature does not hold, or its signer is not trusted.
    """
    opened = open_envelope(envelope)
    try:
        whole = json.loads(opened.payload)
        found, suspect = whole["predicate"], whole["subject"][0]["digest"]["sha256"]
        if whole["predicateType"] != KIND or [found["signer"]] != [key.hex() for key in opened.signers]:
            raise ValueError
    except (ValueError, KeyError, TypeError, IndexError):
        raise ClaimError(
            "is no verdict of a service; pass it as it was downloaded", field="verdict"
        ) from None
    if trusted and found["signer"] not in trusted:
        raise ClaimError("was signed by a key that is not among the trusted ones", field="verdict")
    return {"suspect": suspect, **found}
