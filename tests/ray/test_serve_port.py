"""Reservation of the service's port, without Ray."""

from __future__ import annotations

import os
import socket
import time

import pytest

from mtlsign.commands.service import _report_memory_loss
from mtlsign.config.service import ServiceSettings
from mtlsign.distributed.serve_port import reserve_port
from mtlsign.errors import ClusterError


def listen(port: int = 0) -> socket.socket:
    """Listen as Ray's proxy does."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen()
    return listener


def test_reserve_port_admits_the_proxy_and_refuses_a_second_service() -> None:
    with listen() as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ClusterError, match=f"127.0.0.1:{port}"):  # another service, already running
            reserve_port("127.0.0.1", port)
    with reserve_port("127.0.0.1", port), pytest.raises(ClusterError):  # both start at the same time
        reserve_port("127.0.0.1", port)
    with reserve_port("127.0.0.1", port), listen(port), socket.create_connection(("127.0.0.1", port)):
        pass
    reserve_port("127.0.0.1", port).close()  # the closing connection of the former service is no obstacle


def test_reserve_port_with_program_without_port_sharing_is_refused() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(ClusterError) as caught:
            reserve_port("127.0.0.1", listener.getsockname()[1])
    assert caught.value.field == "port" and "--port" in str(caught.value)


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid"])
def test_reserve_port_with_foreign_address_is_refused(host: str) -> None:
    with pytest.raises(ClusterError, match="--host"):
        reserve_port(host, 8000)


def test_start_with_taken_port_fails_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from mtlsign.distributed import cluster, serve

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("Ray was started"))
    monkeypatch.setattr(cluster, "cluster_address_set", lambda: False)
    environment, start = dict(os.environ), time.monotonic()
    with listen() as listener, pytest.raises(ClusterError, match="--port"):
        serve.start(ServiceSettings.of({"port": listener.getsockname()[1]}))
    assert time.monotonic() - start < 5 and dict(os.environ) == environment


def test_reason_of_ray_error_is_its_last_line() -> None:
    from mtlsign.distributed.serve import _reason

    error = RuntimeError("ray::replica()\n  File x, line 1\n" + "  y\n" * 500 + "ValueError: the cause\n")
    assert _reason(error) == "ValueError: the cause"
    assert _reason(RuntimeError()) == "RuntimeError"


def test_workers_stopped_for_memory_are_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    reported = {"old"}
    for _ in range(2):
        _report_memory_loss({"old": "10.0.0.1", "new": "10.0.0.2"}, reported)
    message = capsys.readouterr().err
    assert message.count("warning: ") == 1 and "10.0.0.2" in message and "10.0.0.1" not in message
