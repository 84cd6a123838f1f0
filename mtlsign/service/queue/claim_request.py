"""Parsing of one claim of a request. A malformed claim has a problem and does not affect other claims."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from mtlsign.service.fetch.locations import MAX_LOCATION
from mtlsign.service.problems import Problem
from mtlsign.service.verifier.verifier import OpenedClaimRef

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NO_CLAIM = OpenedClaimRef()
_FIELDS = {"model", "bundle", "sha256"}


@dataclass(frozen=True)
class ClaimRequest:
    """One claim of a request: its index, and either the parts of a verification task or a problem."""

    index: int
    model: str = ""
    sha256: str | None = None
    opened: OpenedClaimRef = _NO_CLAIM
    problem: Problem | None = None


def parse_claim_request(index: int, claim: object) -> ClaimRequest:
    """Parse the claim at `index` of a request; return any error as the claim's problem."""
    try:
        return _parse(index, claim)
    except Problem as problem:
        return ClaimRequest(index, problem=problem)


def _parse(index: int, claim: object) -> ClaimRequest:
    if not isinstance(claim, dict) or not {"model", "bundle"} <= claim.keys() <= _FIELDS:
        raise Problem("bad-claim", "A claim has the fields model and bundle, and optionally sha256.")
    model, bundle, digest = claim["model"], claim["bundle"], claim.get("sha256")
    if not _is_location(model):
        raise Problem("bad-claim", f"model must be a location of 1 to {MAX_LOCATION} ASCII characters.")
    if digest is not None and not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
        raise Problem("bad-claim", "sha256 must be 64 lower-case hexadecimal digits.")
    if isinstance(bundle, str):
        if not _is_location(bundle):
            raise Problem("bad-claim", f"The location of a bundle has 1 to {MAX_LOCATION} ASCII characters.")
        return ClaimRequest(index, model, digest, OpenedClaimRef(location=bundle))
    if not isinstance(bundle, dict):
        raise Problem("bad-claim", "bundle must be an opened claim (an object) or its location.")
    return ClaimRequest(index, model, digest, OpenedClaimRef(json.dumps(bundle).encode()))


def _is_location(value: object) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= MAX_LOCATION and value.isascii()
