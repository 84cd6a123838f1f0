"""OpenAPI descriptions of the routes: responses, security and bodies that FastAPI does not parse itself."""

from __future__ import annotations

from typing import Any

from mtlsign.service.http.request_models import RequestBody, TokenRequest, VerificationRequest
from mtlsign.service.problems import KINDS, MEDIA, TYPE

PROBLEM: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "enum": [TYPE + name for name in KINDS]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
}
_RESULT = {
    "anyOf": [
        {"type": "null"},
        {"type": "object", "required": ["verdict", "id"]},
        {"type": "object", "required": ["problem"], "properties": {"problem": PROBLEM}},
    ]
}
_JOB = {
    "type": "object",
    "required": ["id", "state", "results"],
    "properties": {
        "id": {"type": "string"},
        "state": {"enum": ["running", "done"]},
        "created": {"type": "number"},
        "results": {"type": "array", "items": _RESULT},
    },
}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "maxLength": 128},
    "description": "A request with the same key of the same token is stored and answered once.",
}
SECURITY: list[dict[str, list[str]]] = [{"bearer": []}]


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return the descriptions of the problem responses of a route."""
    common = {400, 401, 403, 404, 405, 408, 413, 415, 422, 500, 503} | set(codes)
    return {
        code: {"description": "problem details", "content": {MEDIA: {"schema": PROBLEM}}}
        for code in sorted(common)
    }


def _route(success: dict[int, dict[str, Any] | None], *codes: int, **extra: Any) -> dict[str, Any]:
    responses = problems(*codes)
    for code, schema in success.items():
        content = {} if schema is None else {"content": {"application/json": {"schema": schema}}}
        description = "success" if code < 202 else "not finished, or no content"
        responses[code] = {"description": description, **content}
    return {
        "responses": responses,
        "openapi_extra": {"security": SECURITY, **extra},
        "status_code": min(success),
    }


def _body(model: type[RequestBody]) -> dict[str, Any]:
    schema = model.model_json_schema()
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def with_body(route: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a route with that of its body."""
    return route | {"openapi_extra": route["openapi_extra"] | extra}


_ANY = {"type": "object"}
VERIFY = _route({200: _JOB, 202: _JOB}, 409, 429)
VERIFY_BODY = {"requestBody": _body(VerificationRequest), "parameters": [_IDEMPOTENCY_KEY]}
UPLOADS = _route({200: _ANY, 201: _ANY})
VERDICTS = _route({200: None})
LEDGER = _route({200: _ANY})
TOKENS = _route({200: _ANY, 201: _ANY, 204: None})
TOKENS_BODY = {"requestBody": _body(TokenRequest)}
UPLOAD_BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": {}}}}
