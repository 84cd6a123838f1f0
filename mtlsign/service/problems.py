"""What goes wrong, as RFC 9457 problem details: a closed list of types, each with its status and title.

A `Problem` is raised where one request or one claim cannot be answered. A failed claim is a verdict instead.
"""

from __future__ import annotations

from typing import Any

from mtlsign.errors import (
    ArtifactError,
    CarrierError,
    ClaimError,
    KeyMaterialError,
    LedgerError,
    ModelError,
    StorageError,
)
from mtlsign.service import metrics

TYPE = "urn:mtlsign:problem:"
MEDIA = "application/problem+json"

#: name → (HTTP status, title)
KINDS: dict[str, tuple[int, str]] = {
    "malformed-request": (400, "The request is not what the interface says"),
    "unauthenticated": (401, "A valid token is needed"),
    "forbidden": (403, "This token may not do that"),
    "not-found": (404, "There is no such thing here"),
    "wrong-method": (405, "This method is not allowed here"),
    "too-slow": (408, "The body came too slowly"),
    "conflicting-key": (409, "The idempotency key was used for another request"),
    "too-large": (413, "This is larger than allowed"),
    "quota": (413, "The quota of this token is used up"),
    "wrong-media-type": (415, "This media type is not read here"),
    "wrong-digest": (422, "The bytes are not those of the digest"),
    "bad-claim": (422, "The claim is malformed"),
    "bad-bundle": (422, "The opened claim is damaged, unsigned or not allowed"),
    "kit-refused": (422, "Owner kits are secret: never send one"),
    "pointer-refused": (422, "The pointer leads where this service does not go"),
    "not-a-model": (422, "The model is no plain safetensors file within the limits"),
    "architecture-refused": (422, "The architecture is not one that this service builds"),
    "unreachable": (424, "What the claim points to cannot be had"),
    "too-many-claims": (429, "This token has too many claims waiting"),
    "internal": (500, "The service failed"),
    "busy": (503, "The service has too much to do"),
    "not-ready": (503, "The service is not ready"),
    "verifier-lost": (503, "The verifier was lost on this claim, again and again"),
    "ledger": (503, "The ledger cannot be read"),
    "too-long": (504, "The claim took longer than allowed"),
}


class Problem(Exception):
    """One problem of a closed list. `detail` is for people and never quotes a secret.

    Args:
        kind: a name in `KINDS`.
        detail: what happened and what to do.
        retry_after: seconds after which it is worth trying again.
        extra: further members of the document.
    """

    def __init__(self, kind: str, detail: str, *, retry_after: float | None = None, **extra: Any) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail, self.retry_after, self.extra = kind, detail, retry_after, extra
        self.status, self.title = KINDS[kind]

    def __reduce__(self) -> Any:
        return _rebuild, (self.kind, self.detail, self.retry_after, self.extra)

    def document(self) -> dict[str, Any]:
        """The RFC 9457 object."""
        found: dict[str, Any] = {
            "type": TYPE + self.kind,
            "title": self.title,
            "status": self.status,
            "detail": self.detail[:1000].encode("utf-8", "replace").decode(),  # a lone surrogate is no text
        }
        return found | self.extra


def _rebuild(kind: str, detail: str, retry_after: float | None, extra: dict[str, Any]) -> Problem:
    return Problem(kind, detail, retry_after=retry_after, **extra)


def problem_from_error(error: Exception, *, about: str) -> Problem:
    """The problem of one of the package's errors; `about` is "model", "bundle" or "ledger".

    What an error tells of the operator's machines goes to the log alone.
    """
    if about == "ledger" or isinstance(error, LedgerError):
        metrics.log_event("ledger_unread", reason=str(error))
        return Problem("ledger", "the ledger cannot be read at the moment; try again later", retry_after=5)
    if isinstance(error, StorageError):
        metrics.log_event("not_fetched", reason=str(error))
        return Problem(
            "unreachable", "what the pointer names cannot be had; correct the pointer, or try later"
        )
    if about == "model" and isinstance(error, ArtifactError | ModelError):
        return Problem("not-a-model" if isinstance(error, ModelError) else "unreachable", str(error))
    if isinstance(error, ModelError):
        return Problem("architecture-refused", str(error))
    if isinstance(error, KeyMaterialError | ClaimError | ArtifactError | CarrierError):
        return Problem("bad-bundle", str(error))
    return Problem("bad-claim", str(error))
