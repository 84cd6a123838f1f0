"""The S3 half of `storage`: locations, the one server setting, and the files behind it (through boto3)."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from mtlsign.errors import ArtifactError, StorageError
from mtlsign.storage.base import LIST_LIMIT, Names, Storage, check_size, validate_name

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_SEGMENT = re.compile(r"[A-Za-z0-9._=+-]{1,255}")
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
_REGION = re.compile(r"[a-z0-9-]{1,64}")
_PUT_LIMIT = 5 * 2**30
Statuses = list[int]
_CREDENTIALS = {
    "AccessDenied",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestExpired",
    "SignatureDoesNotMatch",
}


class Connection:
    """One S3 server. The boto3 client is made on first use and never pickled."""

    def __init__(self, host: str | None, scheme: str, region: str | None, *, quick: bool = False) -> None:
        self.host, self.scheme, self.region, self.quick = host, scheme, region, quick
        self._client: S3Client | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    @property
    def client(self) -> S3Client:
        """Thread-safe; an unreachable server costs about ten seconds, a silent one as much if `quick`."""
        if self._client is None:
            import boto3
            from botocore.config import Config

            config = Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                connect_timeout=3,
                read_timeout=3 if self.quick else 30,
                retries={"total_max_attempts": 2 if self.quick else 3, "mode": "standard"},
                ignore_configured_endpoint_urls=True,  # type: ignore[call-arg]  # the stubs lack it
            )
            self._client = boto3.session.Session().client(
                "s3",
                endpoint_url=f"{self.scheme}://{self.host}" if self.host else None,
                region_name=self.region,
                config=config,
            )
        return self._client


class S3Storage(Storage):
    """A prefix of a bucket. Every put is one whole object, so a reader never sees a part."""

    def __init__(self, connection: Connection, bucket: str, prefix: str) -> None:
        self.connection, self.bucket, self.prefix = connection, bucket, prefix
        self.uri = s3_uri(bucket, prefix, connection.host, connection.scheme, connection.region)

    def child(self, name: str) -> S3Storage:  # noqa: D102
        key = self._key(name)
        if not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
            raise StorageError(f"{name[:80]!r} is no safe S3 folder name; use A-Z a-z 0-9 . _ = + -")
        return S3Storage(self.connection, self.bucket, key)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{validate_name(name)}" if self.prefix else validate_name(name)

    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:  # noqa: D102
        if len(data) > _PUT_LIMIT:
            raise StorageError(
                f"{name} has more than 5 GiB, S3's limit for one put; write it to a local folder"
            )
        key = self._key(name)
        for attempt in range(6):
            with self._errors("write", key) as refused:
                if if_absent:
                    self.connection.client.put_object(Bucket=self.bucket, Key=key, Body=data, IfNoneMatch="*")
                else:
                    self.connection.client.put_object(Bucket=self.bucket, Key=key, Body=data)
                return True
            if refused == [412]:
                return False
            time.sleep(0.1 * 2**attempt)  # 409: another writer is at it right now
        raise StorageError(f"{self.uri}: other writers keep {name} busy; try again", field="storage")

    def read(self, name: str, limit: int) -> bytes:  # noqa: D102
        key = self._key(name)
        place = f"s3://{self.bucket}/{key}"
        with self._errors("read", key):
            answer = self.connection.client.get_object(Bucket=self.bucket, Key=key)
            with answer["Body"] as body:
                size = answer.get("ContentLength")
                if size is None:
                    raise StorageError(
                        f"{place} came without its size; use a server that sends Content-Length"
                    )
                check_size(place, size, limit)
                data = body.read()
        if len(data) != size:
            raise StorageError(f"{place} came with {len(data)} of {size} bytes; try again", field="storage")
        return data

    @contextmanager
    def open_read(self, name: str, limit: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """A file's size, known and checked before anything is read, and its bytes in pieces of 1 MiB."""
        key = self._key(name)
        with self._errors("read", key):
            answer = self.connection.client.get_object(Bucket=self.bucket, Key=key)
            with answer["Body"]:
                size = answer.get("ContentLength")
                if size is None:
                    raise StorageError(f"s3://{self.bucket}/{key} came without its size; use another server")
                check_size(f"s3://{self.bucket}/{key}", size, limit)
                yield size, answer["Body"].iter_chunks(2**20)

    def exists(self, name: str) -> bool:  # noqa: D102
        try:
            with self._errors("read", self._key(name)):
                self.connection.client.head_object(Bucket=self.bucket, Key=self._key(name))
        except ArtifactError:
            return False
        return True

    def delete(self, name: str) -> None:  # noqa: D102
        key = self._key(name)
        keys = [key, *self._keys(f"{key}/")]
        keys.sort(key=lambda found: (found.rsplit("/", 1)[-1] != "manifest.json", found))
        with self._errors("delete", key):
            for start in range(0, len(keys), 1000):
                chunk = keys[start : start + 1000]
                answer = self.connection.client.delete_objects(
                    Bucket=self.bucket, Delete={"Objects": [{"Key": found} for found in chunk], "Quiet": True}
                )
                if answer.get("Errors"):
                    raise StorageError(
                        f"cannot delete all of s3://{self.bucket}/{key}; try again", field="storage"
                    )

    def check_writable(self) -> None:  # noqa: D102
        server = self.connection
        quick = Connection(server.host, server.scheme, server.region, quick=True)
        super(S3Storage, S3Storage(quick, self.bucket, self.prefix)).check_writable()

    def list(self, prefix: str = "") -> Names:  # noqa: D102
        top = self._key(prefix) if prefix else self.prefix
        cut = len(self.prefix) + 1 if self.prefix else 0
        return sorted(key[cut:] for key in self._keys(f"{top}/" if top else ""))

    def _keys(self, prefix: str) -> Names:
        keys: Names = []
        with self._errors("list", prefix):
            pages = self.connection.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=prefix):
                keys += [entry["Key"] for entry in page.get("Contents", []) if not entry["Key"].endswith("/")]
                if len(keys) > LIST_LIMIT:
                    raise StorageError(
                        f"s3://{self.bucket}/{prefix} holds more than {LIST_LIMIT} files; narrow it down"
                    )
        return keys

    @contextmanager
    def _errors(self, action: str, key: str) -> Iterator[Statuses]:
        """Turn boto3's errors into ours; a refused condition (412, 409) is put into the list instead."""
        import botocore.exceptions as boto

        place = f"s3://{self.bucket}/{key}"
        server = f"{self.connection.scheme}://{self.connection.host}" if self.connection.host else "AWS S3"
        refused: Statuses = []
        # `from None`: the library's own texts may quote requests
        try:
            yield refused
        except boto.ClientError as error:
            code = re.sub(r"[^A-Za-z0-9]", "", str(error.response.get("Error", {}).get("Code", "")))[:64]
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if action == "write" and status in (409, 412):
                refused.append(status)
                return
            if code == "NoSuchBucket":
                fix = f"has no bucket {self.bucket}; create it or correct the location"
            elif code in ("NoSuchKey", "404", "NotFound"):
                raise ArtifactError(f"{place} does not exist; give the right location") from None
            elif status == 403 or code in _CREDENTIALS:
                fix = (
                    f"refused to {action} {place} ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                )
            else:
                fix = f"could not {action} {place} ({code or status}); see the server's log and try again"
            raise StorageError(f"{server} {fix}", field="storage") from None
        except (boto.NoCredentialsError, boto.PartialCredentialsError):
            message = "no S3 credentials found; export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            raise StorageError(message, field="storage") from None
        except (boto.HTTPClientError, boto.ConnectionError) as error:
            fix = f"cannot be reached ({type(error).__name__}); start it, or correct the endpoint setting"
            raise StorageError(f"{server} {fix}", field="storage") from None
        except boto.BotoCoreError as error:
            fix = f"could not {action} {place} ({type(error).__name__}); check the AWS settings"
            raise StorageError(f"{server} {fix}", field="storage") from None


def open_s3(uri: str, endpoint: str | None) -> S3Storage:
    """See `storage.open_storage`."""
    bucket, prefix, options = _split(uri)
    return S3Storage(Connection(*_server(options, endpoint)), bucket, prefix)


def _split(uri: str) -> tuple[str, str, dict[str, str]]:
    # messages here never repeat the location: it may hold somebody's secret
    try:
        parts = urlsplit(uri)
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True) if parts.query else []
    except ValueError:
        raise StorageError("is no readable S3 location; write s3://bucket/prefix", field="storage") from None
    options = dict(pairs)
    allowed = {"endpoint_override", "scheme", "region"}
    if "@" in parts.netloc or {"access_key", "secret_key", "session_token"} & options.keys():
        raise StorageError(
            "carries credentials; remove them and export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead",
            field="storage",
        )
    if len(options) != len(pairs) or not options.keys() <= allowed or parts.fragment:
        raise StorageError(f"has unknown or repeated options; allowed are {sorted(allowed)}", field="storage")
    prefix = parts.path.strip("/")
    segments = prefix.split("/") if prefix else []
    if any(not _SEGMENT.fullmatch(segment) or segment in (".", "..") for segment in segments):
        raise StorageError(
            "has a prefix with other characters than A-Z a-z 0-9 . _ = + -; rename it", field="storage"
        )
    if not _BUCKET.fullmatch(parts.netloc):
        raise StorageError(
            "names no valid bucket (3 to 63 of a-z 0-9 . -); write s3://bucket/prefix", field="storage"
        )
    return parts.netloc, prefix, options


def _server(options: Mapping[str, str], setting: str | None) -> tuple[str | None, str, str | None]:
    """Endpoint host and port (None: AWS), scheme, region (None: whatever AWS says)."""
    environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    inside = options.get("endpoint_override")
    scheme = options.get("scheme")
    found = [_endpoint(text, scheme) for text in (inside, setting) if text]
    if len(set(found)) > 1:
        raise StorageError("names another endpoint than the endpoint setting; give it once", field="storage")
    if not found and environment:
        found = [_endpoint(environment, scheme)]
    host, chosen = found[0] if found else (None, scheme or "https")
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    region = region or ("us-east-1" if host else None)
    if region is not None and not _REGION.fullmatch(region):
        raise StorageError("is no S3 region; write for instance us-east-1", field="region")
    return host, chosen, region


def _endpoint(text: str, scheme: str | None) -> tuple[str, str]:
    own, mark, rest = text.partition("://")
    host, chosen = (rest.rstrip("/"), own) if mark else (text.rstrip("/"), scheme or "https")
    if not _HOST.fullmatch(host) or chosen not in ("http", "https") or (scheme or chosen) != chosen:
        raise StorageError(
            "is no server address; write http://HOST:PORT or https://HOST:PORT", field="endpoint"
        )
    return host, chosen


def s3_uri(bucket: str, prefix: str, host: str | None, scheme: str, region: str | None) -> str:
    """The location that names bucket, prefix and server in full, readable by pyarrow too."""
    options = {"endpoint_override": host, "scheme": scheme if host else None, "region": region}
    query = urlencode({key: value for key, value in options.items() if value}, safe=":")
    return f"s3://{bucket}{'/' if prefix else ''}{prefix}{'?' if query else ''}{query}"
