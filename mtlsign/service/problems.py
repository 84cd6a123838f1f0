"""RFC 9457 problem details: a closed list of problem types, each with an HTTP status and a title.

A `Problem` is raised if a request or a claim cannot be answered. A failed claim is a verdict, not a problem.
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
    "malformed-request": (400, "The request does not follow the interface"),
    "unauthenticated": (401, "A valid token is required"),
    "forbidden": (403, "The token does not permit this"),
    "not-found": (404, "The requested object does not exist"),
    "wrong-method": (405, "The method is not allowed"),
    "too-slow": (408, "The body arrived too slowly"),
    "conflicting-key": (409, "The idempotency key was used for another request"),
    "too-large": (413, "The content is larger than allowed"),
    "quota": (413, "The quota of the token is used up"),
    "wrong-media-type": (415, "The media type is not supported"),
    "wrong-digest": (422, "The bytes do not have the stated digest"),
    "bad-claim": (422, "The claim is malformed"),
    "bad-bundle": (422, "The opened claim is damaged, unsigned or not allowed"),
    "kit-refused": (422, "Owner kits are secret and must never be sent"),
    "pointer-refused": (422, "The location is not one that this service may read"),
    "not-a-model": (422, "The model is not a safetensors file within the limits"),
    "architecture-refused": (422, "The architecture is not one that this service builds"),
    "unreachable": (424, "The model or bundle of the claim cannot be fetched"),
    "too-many-claims": (429, "Too many claims of this token are waiting"),
    "internal": (500, "The service failed"),
    "busy": (503, "The service is overloaded"),
    "not-ready": (503, "The service is not ready"),
    "verifier-lost": (503, "The verifier crashed on this claim repeatedly"),
    "ledger": (503, "The ledger cannot be read"),
    "too-long": (504, "The claim took longer than allowed"),
}
NOT_FETCHED = "The model or bundle at this location cannot be fetched. Correct the location, or try later."


class Problem(Exception):
    """One problem of the closed list. `detail` is read by people and never contains a secret.

    Args:
        kind: a name in `KINDS`.
        detail: the problem and its fix, in full sentences.
        retry_after: seconds after which a retry may succeed.
        extra: further members of the document.
    """

    def __init__(self, kind: str, detail: str, *, retry_after: float | None = None, **extra: Any) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail, self.retry_after, self.extra = kind, detail, retry_after, extra
        self.status, self.title = KINDS[kind]

    def __reduce__(self) -> Any:
        return _rebuild, (self.kind, self.detail, self.retry_after, self.extra)

    def document(self) -> dict[str, Any]:
        """Return the RFC 9457 object."""
        document: dict[str, Any] = {
            "type": TYPE + self.kind,
            "title": self.title,
            "status": self.status,
            # A lone surrogate has no UTF-8 form and is replaced.
            "detail": self.detail[:1000].encode("utf-8", "replace").decode(),
        }
        return document | self.extra


def _rebuild(kind: str, detail: str, retry_after: float | None, extra: dict[str, Any]) -> Problem:
    return Problem(kind, detail, retry_after=retry_after, **extra)


def problem_from_error(error: Exception, *, about: str) -> Problem:
    """Convert an error of the package into a problem; `about` is "model", "bundle" or "ledger".

    Details about the operator's machines are logged and never sent to the client.
    """
    if about == "ledger" or isinstance(error, LedgerError):
        metrics.log_event("ledger_error", reason=str(error))
        return Problem("ledger", "The ledger cannot be read at the moment. Try again later.", retry_after=5)
    if isinstance(error, StorageError):
        metrics.log_event("fetch_failed", reason=str(error))
        return Problem("unreachable", NOT_FETCHED)
    if about == "model" and isinstance(error, ArtifactError | ModelError):
        return Problem("not-a-model" if isinstance(error, ModelError) else "unreachable", str(error))
    if isinstance(error, ModelError):
        return Problem("architecture-refused", str(error))
    if isinstance(error, KeyMaterialError | ClaimError | ArtifactError | CarrierError):
        return Problem("bad-bundle", str(error))
    return Problem("bad-claim", str(error))
