"""Start and end of one real S3 server (SeaweedFS `mini`, from a wheel) on the loopback address."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BUCKET = "mtlsign-test"
START_LIMIT_S = 30.0


@dataclass(frozen=True)
class S3Server:
    """A running server: its address http://127.0.0.1:PORT, bucket, and variables with the credentials."""

    endpoint: str
    bucket: str
    env: dict[str, str] = field(repr=False)


def binary() -> str | None:
    """Return the `weed` program of this Python environment or of PATH; None if it is not installed."""
    installed = Path(sys.prefix, "bin", "weed")
    return str(installed) if os.access(installed, os.X_OK) else shutil.which("weed")


def free_ports(count: int) -> list[int]:
    """Return free loopback ports outside Ray's range whose port + 10000 is free, as SeaweedFS uses both."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 22_700), 2_700):
        with contextlib.suppress(OSError), socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", port))
            high.bind(("127.0.0.1", port + 10_000))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports for the S3 server")


@contextlib.contextmanager
def running(folder: Path) -> Iterator[S3Server]:
    """Run a server with its data in `folder`, a new account and an empty bucket, until the context ends."""
    weed = binary()
    assert weed is not None
    master, volume, filer, s3, admin = free_ports(5)
    env = {
        "AWS_ACCESS_KEY_ID": f"test-{secrets.token_hex(4)}",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}"]
    command += [
        f"-admin.port={admin}",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]
    command += [
        "-s3.autoCreateBucket=false",
        "-master.telemetry=false",
        f"-filer.localSocket={folder}/f.sock",
        f"-s3.localSocket={folder}/s.sock",
    ]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with open(folder / "weed.log", "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**plain, **env, "GOMEMLIMIT": "512MiB", "HOME": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        server = S3Server(f"http://127.0.0.1:{s3}", BUCKET, env)
        _make_bucket(server, process, folder / "weed.log")
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _make_bucket(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path"},
        connect_timeout=2,
        read_timeout=5,
        retries={"total_max_attempts": 1},
    )
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=server.env["AWS_SECRET_ACCESS_KEY"],
        config=config,
    )
    end = time.monotonic() + START_LIMIT_S
    while True:
        try:
            client.create_bucket(Bucket=server.bucket)
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"")
            client.delete_object(Bucket=server.bucket, Key="ready")
            return
        except ClientError as error:
            failure: Exception = error
            if error.response["Error"]["Code"] in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                with contextlib.suppress(ClientError, BotoCoreError):
                    client.put_object(Bucket=server.bucket, Key="ready", Body=b"")
                    return
        except BotoCoreError as error:
            failure = error
        if process.poll() is not None or time.monotonic() > end:
            tail = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the S3 server did not start: {failure}\n{tail}")
        time.sleep(0.2)
