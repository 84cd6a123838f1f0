"""schemathesis on the OpenAPI document: no answer is a 5xx except 503 with Retry-After."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis

from tests.unit.service.fixtures import ServiceFactory, ServiceHarness

if TYPE_CHECKING:
    import schemathesis

EXAMPLES = 25


def test_generated_requests_cause_no_server_error(start_service: ServiceFactory) -> None:
    import schemathesis  # slow to import, and one of the processes alone needs it
    from schemathesis.core.result import Ok

    service: ServiceHarness = start_service(max_wait_s=0.5, ledger="sqlite:////nowhere/ledger.db")
    schema = schemathesis.openapi.from_asgi("/openapi.json", service.client.app)
    headers = service.headers("verify", "ledger", "admin")
    counts: dict[int, int] = {}
    for operation in schema.get_all_operations():
        assert isinstance(operation, Ok), operation
        described = operation.ok()

        @hypothesis.given(case=described.as_strategy())
        @hypothesis.settings(
            max_examples=EXAMPLES, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        def send(case: schemathesis.Case) -> None:
            answer = case.call(headers=headers)
            counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
            assert answer.status_code < 500 or (answer.status_code == 503 and "retry-after" in answer.headers)

        send()
    assert sum(counts.values()) > 200 and {200, 400, 404} <= counts.keys(), counts
