"""etcd's v3 API through its own JSON gateway, over HTTPS with mutual TLS, on several servers.

A call goes to the server that answered last, then to the others. Writes need a majority. Reads ask for a
majority too; while none answers they fall back to one server's own copy, and `lagging` says so.
"""

from __future__ import annotations

import base64
import json
import os
import re
import ssl
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import urllib3

from mtlsign.claims.ledger.tls import Tls
from mtlsign.errors import LedgerError

#: OpenSSL's names of the alerts with which a server refuses a client certificate.
_CERTIFICATE_ALERTS = frozenset(
    ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "SSLV3_ALERT_BAD_CERTIFICATE", "TLSV1_ALERT_UNKNOWN_CA",
     "SSLV3_ALERT_CERTIFICATE_UNKNOWN", "SSLV3_ALERT_CERTIFICATE_EXPIRED", "SSLV3_ALERT_CERTIFICATE_REVOKED")
)  # fmt: skip

CALL_S = 2.0
"""Longest wait for one server's answer."""
TOTAL_S = 12.0
"""Longest wait for any server's answer."""
LAG_S = 5.0
"""After a majority was missed, reads go to one server straight away for so long."""
MAX_ANSWER = 64 * 2**20

_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}")
Answer = dict[str, Any]


def encode(data: bytes | str) -> str:
    """Bytes as the gateway wants them."""
    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode("ascii")


def decode(value: object) -> bytes:
    """Bytes as the gateway gives them; LedgerError for anything else."""
    try:
        return base64.b64decode(str(value), validate=True)
    except ValueError:
        raise LedgerError("a server's answer is damaged; check the cluster", field="ledger") from None


class EtcdClient:
    """A few calls on a cluster. Threads may share one object."""

    def __init__(self, hosts: Sequence[str], tls: Tls) -> None:
        if not hosts or not all(_HOST.fullmatch(host) for host in hosts):
            raise LedgerError("is malformed; give etcd://HOST:PORT[,HOST:PORT…][/PREFIX]", field="ledger")
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

    def call(self, path: str, body: Answer, *, limit: float = TOTAL_S) -> Answer:
        """One answer from a majority.

        Raises:
            LedgerError: no server answered in time. A write may then have happened or not.
        """
        end, told = time.monotonic() + limit, "none answers"
        while True:
            for step in range(len(self.hosts)):
                at = (self._first + step) % len(self.hosts)
                answer, told_now = self._ask(self.hosts[at], path, body, end)
                if answer is not None:
                    self._first, self.confirmed, self.lagging = at, time.monotonic(), None
                    return answer
                told = told_now or told
                if time.monotonic() >= end:
                    break
            if time.monotonic() >= end - 0.2:
                raise LedgerError(
                    f"no majority of {', '.join(self.hosts)} answers ({told}); nothing was acknowledged: "
                    "start the servers, or try again later",
                    field="ledger",
                )
            time.sleep(0.2)

    def read(self, path: str, body: Answer) -> Answer:
        """Like `call` for a range; while no majority answers, one server's copy, and `lagging` is set.

        Raises:
            LedgerError: no server answers at all.
        """
        if time.monotonic() >= self._lag_until:
            try:
                return self.call(path, body, limit=CALL_S + 1)
            except LedgerError:
                self._lag_until = time.monotonic() + LAG_S
        end = time.monotonic() + TOTAL_S / 2
        for host in self.hosts:
            answer, _ = self._ask(host, path, _serializable(body), end)
            if answer is not None:
                ago = "never" if self.confirmed is None else f"{time.monotonic() - self.confirmed:.0f} s ago"
                self.lagging = (
                    f"no majority answers: this is {host}'s copy at revision {revision(answer)}, last "
                    f"confirmed by a majority {ago}; newer entries may exist"
                )
                return answer
        raise LedgerError(f"none of {', '.join(self.hosts)} answers; start them", field="ledger")

    def _ask(self, host: str, path: str, body: Answer, end: float) -> tuple[Answer | None, str | None]:
        wait = max(0.2, min(CALL_S, end - time.monotonic()))
        try:
            answer = self._pool.request(
                "POST", f"https://{host}{path}", body=json.dumps(body), preload_content=False,
                headers={"Content-Type": "application/json"}, redirect=False,
                timeout=urllib3.Timeout(connect=min(1.0, wait), read=wait),
            )  # fmt: skip
            data = answer.read(MAX_ANSWER + 1)
            answer.release_conn()
        except urllib3.exceptions.SSLError as error:
            raise LedgerError(
                f"{host} and we do not trust each other ({_short(error)}); check --etcd-ca, --etcd-cert and "
                "--etcd-key",
                field="ledger",
            ) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if _certificate_refused(error):
                raise LedgerError(
                    f"{host} refuses our certificate; check --etcd-cert", field="ledger"
                ) from None
            return None, type(error).__name__
        try:
            found = json.loads(data) if len(data) <= MAX_ANSWER else None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            return None, f"{host} does not speak etcd v3"
        if answer.status != 200:
            told = str(found.get("message", found.get("error", answer.status)))[:120]
            if answer.status in (400, 401, 403, 404):
                raise LedgerError(f"{host} refuses: {told}; check the URI and the rights", field="ledger")
            return None, told
        return found, None


def revision(answer: Answer) -> int:
    """The store's revision at which an answer was made."""
    try:
        return int(answer["header"]["revision"])
    except (KeyError, TypeError, ValueError):
        raise LedgerError("a server's answer is damaged; check the cluster", field="ledger") from None


def _serializable(body: Answer) -> Answer:
    """The same read from one server's copy; a transaction's reads one by one."""
    if "success" not in body:
        return {**body, "serializable": True}
    return {
        "success": [{"requestRange": {**op["requestRange"], "serializable": True}} for op in body["success"]]
    }


def _context(tls: Tls) -> ssl.SSLContext:
    files = [
        given or (Path(os.environ[name]) if os.environ.get(name) else None)
        for given, name in ((tls.ca, "ETCDCTL_CACERT"), (tls.cert, "ETCDCTL_CERT"), (tls.key, "ETCDCTL_KEY"))
    ]
    ca, cert, key = files
    if ca is None or cert is None or key is None:
        raise LedgerError(
            "etcd is spoken to with mutual TLS only; give --etcd-ca, --etcd-cert and --etcd-key",
            field="ledger",
        )
    try:
        context = ssl.create_default_context(cafile=str(ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(str(cert), str(key))
    except (OSError, ssl.SSLError) as error:
        raise LedgerError(
            f"the TLS files cannot be used ({_short(error)}); give PEM files that fit together",
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
