"""One claim of a request as it was sent: what it asks for, or the problem that it is."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from mtlsign.service.fetch.locations import MAX_POINTER
from mtlsign.service.problems import Problem
from mtlsign.service.verifier.verifier import OpenedClaimRef

NOTHING = OpenedClaimRef()
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ClaimRequest:
    """One claim of a request: its place, and the task's parts or the problem that it is."""

    at: int
    model: str = ""
    sha256: str | None = None
    question: OpenedClaimRef = NOTHING
    problem: Problem | None = None


def parse_claim_request(at: int, claim: object) -> ClaimRequest:
    """A claim as it was sent; whatever is wrong with it is its own problem."""
    try:
        if not isinstance(claim, dict) or not {"model", "bundle"} <= claim.keys() <= {
            "model",
            "bundle",
            "sha256",
        }:
            raise Problem("bad-claim", "a claim has the fields model, bundle and, if you like, sha256")
        model, bundle, digest = claim["model"], claim["bundle"], claim.get("sha256")
        if not _is_pointer(model):
            raise Problem("bad-claim", f"model must be a pointer of at most {MAX_POINTER} ASCII characters")
        if digest is not None and not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
            raise Problem("bad-claim", "sha256 must be 64 lower-case hexadecimal digits")
        if isinstance(bundle, str):
            if not _is_pointer(bundle):
                raise Problem("bad-claim", f"a bundle's pointer has 1 to {MAX_POINTER} ASCII characters")
            return ClaimRequest(at, model, digest, OpenedClaimRef(pointer=bundle))
        if not isinstance(bundle, dict):
            raise Problem("bad-claim", "bundle must be an opened claim (an object) or a pointer to one")
        return ClaimRequest(at, model, digest, OpenedClaimRef(json.dumps(bundle).encode()))
    except Problem as problem:
        return ClaimRequest(at, problem=problem)


def _is_pointer(value: object) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= MAX_POINTER and value.isascii()
