"""Client of etcd's v3 JSON gateway over HTTPS with mutual TLS, for a cluster of several servers.

A call goes to the server that answered last, then to the other ones. Writes need a majority. Reads ask for a
majority too; without one they fall back to the copy of a single server, and `lagging` describes the lag.
"""

from __future__ import annotations

import base64
import json
import os
import re
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3

from mtlsign.claims.ledger.tls import Tls
from mtlsign.errors import LedgerError

#: OpenSSL's names of the alerts with which a server rejects a client certificate.
_CERTIFICATE_ALERTS = frozenset(
    ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "SSLV3_ALERT_BAD_CERTIFICATE", "TLSV1_ALERT_UNKNOWN_CA",
     "SSLV3_ALERT_CERTIFICATE_UNKNOWN", "SSLV3_ALERT_CERTIFICATE_EXPIRED", "SSLV3_ALERT_CERTIFICATE_REVOKED")
)  # fmt: skip

CALL_S = 2.0
"""Timeout for the response of one server."""
TOTAL_S = 12.0
"""Timeout for the response of any server."""
LAG_S = 5.0
"""Time after a missing majority in which reads go to a single server at once."""
MAX_RESPONSE = 64 * 2**20

#: gRPC code of a response → remedy (google.golang.org/grpc/codes).
_REMEDIES = {
    "3": "The server refuses the size or form of the request. Set --max-request-bytes of etcd to at least "
    "262144 and --max-txn-ops to at least 128.",
    "8": "The space quota of etcd is used up, or it is overloaded. Compact and defragment the members, raise "
    "--quota-backend-bytes, and run etcdctl alarm disarm.",
    "11": "The cluster no longer has that revision: it was compacted, or restored from a snapshot. Compare "
    "the ledger with a stored checkpoint by jobs/ledger.py check --head.",
}
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}")
Response = dict[str, Any]


def encode(data: bytes | str) -> str:
    """Return bytes in the base64 form of the gateway."""
    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode("ascii")


def decode(value: object) -> bytes:
    """Return the bytes of a value in the base64 form of the gateway. Raises LedgerError if it is damaged."""
    try:
        return base64.b64decode(str(value), validate=True)
    except ValueError:
        raise damaged_response_error() from None


def damaged_response_error() -> LedgerError:
    """Return the error for a response that does not have the form of etcd's API."""
    return LedgerError("The response of a server is damaged. Check the etcd cluster.", field="ledger")


@dataclass(frozen=True)
class _Problem:
    """Reason why a server gave no usable response, and the remedy for display."""

    cause: str
    remedy: str = "Start the servers, or try once more later."


class EtcdClient:
    """Client of one etcd cluster. Threads can share one object."""

    def __init__(self, hosts: Sequence[str], tls: Tls) -> None:
        if not hosts or not all(_HOST.fullmatch(host) for host in hosts):
            raise LedgerError(
                "The URI is malformed. Use etcd://HOST:PORT[,HOST:PORT…][/PREFIX].", field="ledger"
            )
        self.hosts = list(hosts)
        self._pool = urllib3.PoolManager(
            maxsize=16,
            retries=False,
            ssl_context=_context(tls),
            timeout=urllib3.Timeout(connect=1.0, read=CALL_S),
        )
        self._first = 0
        self._lag_until = 0.0
        self.confirmed: float | None = None
        self.lagging: str | None = None

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    def call(self, path: str, body: Response, *, limit: float = TOTAL_S) -> Response:
        """Return a response from a majority.

        Args:
            path: path of the gateway's method.
            body: the request as JSON values.
            limit: timeout in seconds over all servers.

        Raises:
            LedgerError: no server answered in time. The outcome of a write is then unknown.
        """
        end, problem = time.monotonic() + limit, _Problem("no response")
        while True:
            for step in range(len(self.hosts)):
                position = (self._first + step) % len(self.hosts)
                response, host_problem = self._send(self.hosts[position], path, body, end)
                if response is not None:
                    self._first, self.confirmed, self.lagging = position, time.monotonic(), None
                    return response
                problem = host_problem or problem
                if time.monotonic() >= end:
                    break
            if time.monotonic() >= end - 0.2:
                raise LedgerError(
                    f"No majority of {', '.join(self.hosts)} answers ({problem.cause}); nothing was "
                    f"acknowledged. {problem.remedy}",
                    field="ledger",
                )
            time.sleep(0.2)

    def read(self, path: str, body: Response) -> Response:
        """Return a response as `call` does, or one server's copy while no majority answers.

        `lagging` is then set to a sentence that describes the lag.

        Args:
            path: path of the gateway's method.
            body: a range request, or a transaction of range requests, as JSON values.

        Raises:
            LedgerError: no server answers.
        """
        if time.monotonic() >= self._lag_until:
            try:
                return self.call(path, body, limit=CALL_S + 1)
            except LedgerError:
                self._lag_until = time.monotonic() + LAG_S
        end = time.monotonic() + TOTAL_S / 2
        for host in self.hosts:
            response, _ = self._send(host, path, _serializable(body), end)
            if response is not None:
                ago = "never" if self.confirmed is None else f"{time.monotonic() - self.confirmed:.0f} s ago"
                self.lagging = (
                    f"No majority answers: this is {host}'s copy at revision {revision(response)}, last "
                    f"confirmed by a majority {ago}; newer entries may exist."
                )
                return response
        raise LedgerError(f"None of {', '.join(self.hosts)} answers. Start the servers.", field="ledger")

    def _send(
        self, host: str, path: str, body: Response, end: float
    ) -> tuple[Response | None, _Problem | None]:
        """Return the response of one server, or None and the problem."""
        wait = max(0.2, min(CALL_S, end - time.monotonic()))
        try:
            http_response = self._pool.request(
                "POST", f"https://{host}{path}", body=json.dumps(body), preload_content=False,
                headers={"Content-Type": "application/json"}, redirect=False,
                timeout=urllib3.Timeout(connect=min(1.0, wait), read=wait),
            )  # fmt: skip
            data = http_response.read(MAX_RESPONSE + 1)
            http_response.release_conn()
        except urllib3.exceptions.SSLError as error:
            raise LedgerError(
                f"{host} and this client do not trust each other ({_short(error)}). Check --etcd-ca, "
                "--etcd-cert and --etcd-key.",
                field="ledger",
            ) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if _certificate_refused(error):
                raise LedgerError(
                    f"{host} rejects the client certificate. Check --etcd-cert.", field="ledger"
                ) from None
            return None, _Problem(type(error).__name__)
        try:
            fields = json.loads(data) if len(data) <= MAX_RESPONSE else None
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            return None, _Problem(f"{host} is not an etcd v3 server", "Correct the URI.")
        if http_response.status != 200:
            cause = _short(fields.get("message", fields.get("error", http_response.status)))[:120]
            remedy = _REMEDIES.get(str(fields.get("code")))
            if http_response.status in (400, 401, 403, 404):
                remedy = remedy or "Check the URI and the permissions."
                raise LedgerError(f"{host} rejects the request: {cause}. {remedy}", field="ledger")
            return None, _Problem(cause, remedy or _Problem.remedy)
        return fields, None


def revision(response: Response) -> int:
    """Return the revision of the store at which a response was made."""
    try:
        return int(response["header"]["revision"])
    except (KeyError, TypeError, ValueError):
        raise damaged_response_error() from None


def _serializable(body: Response) -> Response:
    """Return the same read from a single server's copy; in a transaction every read is marked."""
    if "success" not in body:
        return {**body, "serializable": True}
    return {
        "success": [{"requestRange": {**op["requestRange"], "serializable": True}} for op in body["success"]]
    }


def _context(tls: Tls) -> ssl.SSLContext:
    files = [
        path or (Path(os.environ[name]) if os.environ.get(name) else None)
        for path, name in ((tls.ca, "ETCDCTL_CACERT"), (tls.cert, "ETCDCTL_CERT"), (tls.key, "ETCDCTL_KEY"))
    ]
    ca, cert, key = files
    if ca is None or cert is None or key is None:
        raise LedgerError(
            "etcd requires mutual TLS. Pass --etcd-ca, --etcd-cert and --etcd-key.",
            field="ledger",
        )
    try:
        context = ssl.create_default_context(cafile=str(ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(str(cert), str(key))
    except (OSError, ssl.SSLError) as error:
        raise LedgerError(
            f"The TLS files cannot be used ({_short(error)}). Pass PEM files that belong together.",
            field="ledger",
        ) from None
    return context


def _certificate_refused(error: BaseException) -> bool:
    """Return whether the server ended the TLS handshake because of this client's certificate.

    urllib3 reports the alert of TLS 1.3 as a broken connection; the `ssl.SSLError` is among its arguments.
    """
    if isinstance(error, ssl.SSLError):
        return error.reason in _CERTIFICATE_ALERTS
    inner = [
        item for item in (error.__cause__, error.__context__, *error.args) if isinstance(item, BaseException)
    ]
    return any(_certificate_refused(item) for item in inner if item is not error)


def _short(error: object) -> str:
    return " ".join(str(error).split())[-160:]
