"""Validation of request bodies."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mtlsign.service.http.request_models import TokenRequest, VerificationRequest, parse_request
from mtlsign.service.problems import Problem

BIG = "9" * 400


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (VerificationRequest, '{"claims": [1], "wait_s": null}'),
        (VerificationRequest, '{"claims": [1], "wait_s": "5"}'),
        (VerificationRequest, f'{{"claims": [1], "wait_s": {BIG}}}'),
        (VerificationRequest, '{"wait_s": 1}'),
        (TokenRequest, '{"name": "n", "scopes": ["verify"], "hours": null}'),
        (TokenRequest, '{"name": "n", "scopes": ["verify"], "hours": true}'),
        (TokenRequest, '{"name": "n", "scopes": ["verify"], "hours": 0}'),
        (TokenRequest, '{"name": "n", "scopes": "verify"}'),
        (TokenRequest, '{"name": 5, "scopes": ["verify"]}'),
        (TokenRequest, '{"name": "n", "scopes": ["verify"], "secret\\u0000": 1}'),
    ],
)
def test_parse_request_with_invalid_value_is_malformed(model: Any, text: str) -> None:
    with pytest.raises(Problem) as caught:
        parse_request(model, json.loads(text))
    assert caught.value.kind == "malformed-request" and caught.value.detail.isascii()
    assert BIG not in caught.value.detail


def test_parse_request_with_valid_values_sets_defaults() -> None:
    request = parse_request(VerificationRequest, {"claims": [None]})
    assert request.claims == [None] and request.wait_s == 10
    token = parse_request(TokenRequest, {"name": "n", "scopes": ["verify"]})
    assert "hours" not in token.model_fields_set
