"""schemathesis over the OpenAPI: whatever is sent, no answer is a 5xx but 503 with Retry-After."""

from __future__ import annotations

import hypothesis
import schemathesis
from schemathesis.core.result import Ok

from tests.unit.service.fixtures import Service, Start

EXAMPLES = 25


def test_no_request_breaks_the_service(start: Start) -> None:
    service: Service = start(max_wait_s=0.5, ledger="sqlite:////nowhere/ledger.db")
    schema = schemathesis.openapi.from_asgi("/openapi.json", service.client.app)
    headers = service.headers("verify", "ledger", "admin")
    seen: dict[int, int] = {}
    for operation in schema.get_all_operations():
        assert isinstance(operation, Ok), operation
        found = operation.ok()

        @hypothesis.given(case=found.as_strategy())
        @hypothesis.settings(
            max_examples=EXAMPLES, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        def send(case: schemathesis.Case) -> None:
            answer = case.call(headers=headers)
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            assert answer.status_code < 500 or (answer.status_code == 503 and "retry-after" in answer.headers)

        send()
    assert sum(seen.values()) > 200 and {200, 400, 404} <= seen.keys(), seen
