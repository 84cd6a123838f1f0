"""What OpenAPI says about the routes: bodies are parsed by hand, for hostile input, and described here."""

from __future__ import annotations

from typing import Any

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
_TEXT = {"type": "string"}
_POINTER = {"type": "string", "minLength": 1, "maxLength": 2048, "examples": ["s3://BUCKET/models/DIGEST"]}
_BUNDLE = {
    "type": "object",
    "required": ["opening", "reference"],
    "properties": {"opening": {"type": "object"}, "reference": _TEXT, "head": _TEXT, "claim": _TEXT},
}
_CLAIM = {
    "type": "object",
    "required": ["model", "bundle"],
    "properties": {"model": _POINTER, "bundle": {"anyOf": [_BUNDLE, _POINTER]}, "sha256": _TEXT},
}
REQUEST: dict[str, Any] = {
    "type": "object",
    "required": ["claims"],
    "additionalProperties": False,
    "properties": {
        # A malformed claim is that claim's problem, not the request's.
        "claims": {"type": "array", "minItems": 1, "maxItems": 256, "items": {"anyOf": [_CLAIM, {}]}},
        "wait_s": {"type": "number", "minimum": 0, "maximum": 3600, "default": 10},
    },
}
_ANSWER = {
    "type": "object",
    "required": ["id", "state", "results"],
    "properties": {
        "id": _TEXT,
        "state": {"enum": ["running", "done"]},
        "created": {"type": "number"},
        "results": {
            "type": "array",
            "items": {
                "anyOf": [
                    {"type": "null"},
                    {"type": "object", "required": ["verdict", "id"]},
                    {"type": "object", "required": ["problem"], "properties": {"problem": PROBLEM}},
                ]
            },
        },
    },
}
_TOKEN_REQUEST = {
    "type": "object",
    "required": ["name", "scopes"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 64},
        "scopes": {"type": "array", "items": {"enum": ["verify", "ledger", "admin"]}, "minItems": 1},
        "hours": {"type": "number", "exclusiveMinimum": 0},
    },
}
_IDEMPOTENCY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "maxLength": 128},
    "description": "the same key of the same token: the same request, answered once",
}
SECURITY: list[dict[str, list[str]]] = [{"bearer": []}]


def problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The answers that are no success."""
    always = {400, 401, 403, 404, 405, 408, 413, 415, 422, 500, 503} | set(codes)
    return {
        code: {"description": "problem details", "content": {MEDIA: {"schema": PROBLEM}}}
        for code in sorted(always)
    }


def _route(success: dict[int, dict[str, Any] | None], *codes: int, **extra: Any) -> dict[str, Any]:
    answers = problems(*codes)
    for code, schema in success.items():
        content = {} if schema is None else {"content": {"application/json": {"schema": schema}}}
        answers[code] = {"description": "done" if code < 202 else "not yet, or nothing to say", **content}
    return {
        "responses": answers,
        "openapi_extra": {"security": SECURITY, **extra},
        "status_code": min(success),
    }


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


_ANY = {"type": "object"}
VERIFY = _route({200: _ANSWER, 202: _ANSWER}, 409, 429)
VERIFY_BODY = {"requestBody": _body(REQUEST), "parameters": [_IDEMPOTENCY]}
UPLOADS = _route({200: _ANY, 201: _ANY})
VERDICTS = _route({200: None})
LEDGER = _route({200: _ANY})
TOKENS = _route({200: _ANY, 201: _ANY, 204: None})
TOKENS_BODY = {"requestBody": _body(_TOKEN_REQUEST)}
UPLOAD_BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": {}}}}


def with_body(route: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """A route's description with a body."""
    return route | {"openapi_extra": route["openapi_extra"] | extra}
