"""Pydantic models of JSON request bodies. They validate the parsed JSON and describe it in OpenAPI."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mtlsign.service.fetch.locations import MAX_LOCATION
from mtlsign.service.problems import Problem

_TEXT: dict[str, Any] = {"type": "string"}
_LOCATION: dict[str, Any] = {
    "type": "string", "minLength": 1, "maxLength": MAX_LOCATION, "examples": ["s3://BUCKET/models/DIGEST"],
}  # fmt: skip
_BUNDLE: dict[str, Any] = {
    "type": "object",
    "required": ["opening", "reference"],
    "properties": {"opening": {"type": "object"}, "reference": _TEXT, "head": _TEXT, "claim": _TEXT},
}
_CLAIM: dict[str, Any] = {
    "type": "object",
    "required": ["model", "bundle"],
    "properties": {"model": _LOCATION, "bundle": {"anyOf": [_BUNDLE, _LOCATION]}, "sha256": _TEXT},
}


class RequestBody(BaseModel):
    """Base of all request bodies: no conversion of types, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


class VerificationRequest(RequestBody):
    """Body of `POST /v1/verifications`.

    The queue validates the claims one by one, because a malformed claim is a problem of that claim and not of
    the request. The settings limit their number.
    """

    claims: list[Any] = Field(
        json_schema_extra={"minItems": 1, "maxItems": 256, "items": {"anyOf": [_CLAIM, {}]}}
    )
    wait_s: float = Field(10, ge=0, le=3600, allow_inf_nan=False)


class TokenRequest(RequestBody):
    """Body of `POST /v1/tokens`."""

    name: str = Field(min_length=1, max_length=64)
    scopes: list[Literal["verify", "ledger", "admin"]] = Field(min_length=1)
    #: the default is shown in OpenAPI only; the route uses the setting `token_ttl_hours`
    hours: float = Field(24 * 90, gt=0, le=24 * 3650, allow_inf_nan=False)


M = TypeVar("M", bound=RequestBody)


def parse_request(model: type[M], value: object) -> M:
    """Validate a parsed JSON value. Raises Problem `malformed-request`, which never repeats a value."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"][:2]).encode("unicode_escape").decode()[:60]
        raise Problem("malformed-request", f"{field}: {first['msg']}." if field else first["msg"]) from None
