"""Start and end of a real etcd cluster: three nodes over mutual TLS on the loopback address.

The program is Debian's `etcd` (3.4.23 or later of 3.4): from $MTLSIGN_ETCD, from PATH, or unpacked from the
package `etcd-server`, which `apt-get download` fetches without installing anything.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import random
import secrets
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mtlsign.claims.ledger.tls import Tls

START_LIMIT_S = 30.0


def program() -> tuple[str | None, str]:
    """Return the etcd program and an empty text, or None and the reason."""
    for path in (os.environ.get("MTLSIGN_ETCD"), shutil.which("etcd")):
        if path and os.access(path, os.X_OK):
            return path, ""
    cache = Path(tempfile.gettempdir()) / f"mtlsign-etcd-{os.getuid()}"
    unpacked = cache / "root" / "usr" / "bin" / "etcd"
    if unpacked.is_file():
        return str(unpacked), ""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return None, "etcd is not installed, and this system has no apt-get to fetch it"
    cache.mkdir(mode=0o700, exist_ok=True)
    try:
        fetch = ["apt-get", "download", "etcd-server"]
        subprocess.run(fetch, cwd=cache, check=True, capture_output=True, timeout=120)
        (package,) = cache.glob("etcd-server_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), str(cache / "root")], check=True, timeout=60)
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        output = getattr(error, "stderr", b"") or str(error).encode()
        return (
            None,
            f"etcd is not installed and cannot be fetched: {output.decode(errors='replace').strip()[-200:]}",
        )
    return str(unpacked), ""


class Authority:
    """A certificate authority for one test."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"mtlsign test {name}")])
        self.ca = folder / f"{name}.pem"
        self.ca.write_bytes(self._certificate(self._name, self._key.public_key(), ca=True))

    def _certificate(self, subject: x509.Name, public: ec.EllipticCurvePublicKey, *, ca: bool) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
            .add_extension(
                x509.KeyUsage(True, False, False, False, False, ca, ca, False, False), critical=True
            )
        )
        if not ca:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
            builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def issue(self, name: str) -> Tls:
        """Write a new certificate for 127.0.0.1 and return its files."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        cert, private = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        cert.write_bytes(self._certificate(subject, key.public_key(), ca=False))
        with open(private, "wb", opener=lambda p, f: os.open(p, f, 0o600)) as file:
            file.write(
                key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
            )
        return Tls(self.ca, cert, private)


class Cluster:
    """A cluster of three nodes, which can be killed and restarted with their data.

    `uri` and `tls` open a ledger.
    """

    def __init__(self, etcd: str, folder: Path) -> None:
        self.etcd, self.folder = etcd, folder
        self.authority = Authority(folder)
        self.tls = self.authority.issue("client")
        self.ports = _free_ports(6)
        self.hosts = [f"127.0.0.1:{port}" for port in self.ports[:3]]
        self._token = secrets.token_hex(4)
        self._nodes: list[subprocess.Popen[bytes] | None] = [None] * 3
        self._files = [self.authority.issue(f"n{i}") for i in range(3)]

    def uri(self, prefix: str = "") -> str:
        """Return the ledger URI with all hosts."""
        return f"etcd://{','.join(self.hosts)}{prefix}"

    def start(self, *numbers: int) -> None:
        """Start these nodes (all three by default) and wait for a leader."""
        for i in numbers or range(3):
            self._start(i)
        end = time.monotonic() + START_LIMIT_S
        while self.leader() is None:
            if time.monotonic() > end:
                logs = "\n".join(p.read_text(errors="replace")[-1500:] for p in self.folder.glob("*.log"))
                raise RuntimeError(f"etcd did not start\n{logs}")
            time.sleep(0.1)

    def _start(self, i: int) -> None:
        peers = ",".join(f"n{j}=https://127.0.0.1:{self.ports[3 + j]}" for j in range(3))
        client, peer = f"https://{self.hosts[i]}", f"https://127.0.0.1:{self.ports[3 + i]}"
        files = self._files[i]
        command = [self.etcd, "--name", f"n{i}", "--data-dir", str(self.folder / f"d{i}"), "--logger", "zap"]
        command += ["--listen-client-urls", client, "--advertise-client-urls", client]
        command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        command += ["--initial-cluster", peers, "--initial-cluster-state", "new"]
        command += ["--initial-cluster-token", self._token, "--heartbeat-interval", "100"]
        command += ["--election-timeout", "1000", "--client-cert-auth", "--peer-client-cert-auth"]
        command += ["--trusted-ca-file", str(files.ca), "--cert-file", str(files.cert)]
        command += ["--key-file", str(files.key), "--peer-trusted-ca-file", str(files.ca)]
        command += ["--peer-cert-file", str(files.cert), "--peer-key-file", str(files.key)]
        plain = {k: v for k, v in os.environ.items() if not k.startswith("ETCD")}
        with open(self.folder / f"n{i}.log", "ab") as log:
            self._nodes[i] = subprocess.Popen(
                command, cwd=self.folder, env=plain, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def kill(self, i: int) -> None:
        """Send SIGKILL to a node, which then cannot close anything."""
        node = self._nodes[i]
        if node is not None:
            node.kill()
            node.wait(10)
            self._nodes[i] = None

    def leader(self) -> int | None:
        """Return the number of the node that claims to be the leader, if one answers."""
        context = ssl.create_default_context(cafile=str(self.tls.ca))
        context.load_cert_chain(str(self.tls.cert), str(self.tls.key))
        for i, host in enumerate(self.hosts):
            if self._nodes[i] is None:
                continue
            request = urllib.request.Request(f"https://{host}/v3/maintenance/status", data=b"{}")
            with contextlib.suppress(urllib.error.URLError, OSError, ValueError):
                with urllib.request.urlopen(request, timeout=1, context=context) as answer:
                    status = json.load(answer)
                if status.get("leader") and status["leader"] == status["header"]["member_id"]:
                    return i
        return None

    def stop(self) -> None:
        """Kill all nodes."""
        for i in range(3):
            self.kill(i)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Run a cluster with its data in `folder` until the context ends."""
    etcd, reason = program()
    if etcd is None:
        raise RuntimeError(reason)
    cluster = Cluster(etcd, folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(23_000, 29_000), 6_000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports for etcd")
