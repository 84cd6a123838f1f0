"""S3 storage through boto3: parsing of locations, the server setting, and reading and writing objects."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from mtlsign.errors import ArtifactError, MTLSignError, StorageError
from mtlsign.storage.base import LIST_LIMIT, Names, Storage, check_size, validate_name

if TYPE_CHECKING:
    from botocore.response import StreamingBody
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
    """Connection to one S3 server. The boto3 client is created on first use and never pickled."""

    def __init__(self, host: str | None, scheme: str, region: str | None, *, quick: bool = False) -> None:
        self.host, self.scheme, self.region, self.quick = host, scheme, region, quick
        self._client: S3Client | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    @property
    def client(self) -> S3Client:
        """The thread-safe boto3 client.

        An unreachable server fails after about ten seconds; with `quick`, a silent server does so, too.
        """
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
    """Prefix of a bucket. Every put writes a complete object, so a reader never sees a part of one."""

    def __init__(self, connection: Connection, bucket: str, prefix: str) -> None:
        self.connection, self.bucket, self.prefix = connection, bucket, prefix
        self.uri = s3_uri(bucket, prefix, connection.host, connection.scheme, connection.region)

    def child(self, name: str) -> S3Storage:  # noqa: D102
        key = self._key(name)
        if not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
            raise StorageError(f"{name[:80]!r} is not a safe S3 folder name. Use A-Z a-z 0-9 . _ = + -")
        return S3Storage(self.connection, self.bucket, key)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{validate_name(name)}" if self.prefix else validate_name(name)

    def write(self, name: str, data: bytes, *, if_absent: bool = False) -> bool:  # noqa: D102
        if len(data) > _PUT_LIMIT:
            raise StorageError(
                f"{name} has more than 5 GiB, the limit of S3 for one object. Write it to a local folder."
            )
        key = self._key(name)
        for attempt in range(6):
            with self._errors("write", key) as refusals:
                if if_absent:
                    self.connection.client.put_object(Bucket=self.bucket, Key=key, Body=data, IfNoneMatch="*")
                else:
                    self.connection.client.put_object(Bucket=self.bucket, Key=key, Body=data)
                return True
            if refusals == [412]:
                return False
            time.sleep(0.1 * 2**attempt)  # 409: another writer is writing this object now
        raise StorageError(
            f"Other writers keep writing {name} in {self.uri}. Try again later.", field="storage"
        )

    def read(self, name: str, limit: int) -> bytes:  # noqa: D102
        with self._open(name, limit) as (size, body):
            data = body.read()
        if len(data) != size:
            raise StorageError(
                f"The server sent {len(data)} of the {size} bytes of {self._location(name)}. Try again.",
                field="storage",
            )
        return data

    @contextmanager
    def open_read(self, name: str, limit: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Yield the size of a file, checked before anything is read, and its bytes in pieces of 1 MiB."""
        with self._open(name, limit) as (size, body):
            yield size, body.iter_chunks(2**20)

    @contextmanager
    def _open(self, name: str, limit: int) -> Iterator[tuple[int, StreamingBody]]:
        key = self._key(name)
        with self._errors("read", key):
            response = self.connection.client.get_object(Bucket=self.bucket, Key=key)
            body = response["Body"]
            with body:  # entering it gives the raw HTTP response, which has no iter_chunks
                size = response.get("ContentLength")
                if size is None:
                    raise StorageError(
                        f"The server sent {self._location(name)} without its size. "
                        "Use a server that sends Content-Length."
                    )
                check_size(self._location(name), size, limit)
                yield size, body

    def _location(self, name: str) -> str:
        return f"s3://{self.bucket}/{self._key(name)}"

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
        keys.sort(key=lambda entry: (entry.rsplit("/", 1)[-1] != "manifest.json", entry))
        with self._errors("delete", key):
            for start in range(0, len(keys), 1000):
                chunk = keys[start : start + 1000]
                response = self.connection.client.delete_objects(
                    Bucket=self.bucket, Delete={"Objects": [{"Key": entry} for entry in chunk], "Quiet": True}
                )
                if response.get("Errors"):
                    raise StorageError(
                        f"The server did not delete all of s3://{self.bucket}/{key}. Try again.",
                        field="storage",
                    )

    def check_writable(self) -> None:  # noqa: D102
        server = self.connection
        quick = Connection(server.host, server.scheme, server.region, quick=True)
        super(S3Storage, S3Storage(quick, self.bucket, self.prefix)).check_writable()

    def list(self, prefix: str = "") -> Names:  # noqa: D102
        top = self._key(prefix) if prefix else self.prefix
        start = len(self.prefix) + 1 if self.prefix else 0
        return sorted(key[start:] for key in self._keys(f"{top}/" if top else ""))

    def _keys(self, prefix: str) -> Names:
        keys: Names = []
        with self._errors("list", prefix):
            pages = self.connection.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=prefix):
                keys += [entry["Key"] for entry in page.get("Contents", []) if not entry["Key"].endswith("/")]
                if len(keys) > LIST_LIMIT:
                    raise StorageError(
                        f"s3://{self.bucket}/{prefix} has more than {LIST_LIMIT} files. Use another prefix."
                    )
        return keys

    @contextmanager
    def _errors(self, action: str, key: str) -> Iterator[Statuses]:
        """Map the errors of boto3 to `MTLSignError`s; a refused condition (412, 409) is added to the list."""
        import botocore.exceptions as boto

        server = f"{self.connection.scheme}://{self.connection.host}" if self.connection.host else "AWS S3"
        refusals: Statuses = []
        # `from None`: the messages of the library may quote requests
        try:
            yield refusals
        except boto.ClientError as error:
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if action == "write" and status in (409, 412):
                refusals.append(status)
                return
            code = re.sub(r"[^A-Za-z0-9]", "", str(error.response.get("Error", {}).get("Code", "")))[:64]
            raise self._client_error(server, action, key, code, status) from None
        except (boto.NoCredentialsError, boto.PartialCredentialsError):
            raise StorageError(
                "S3 credentials are missing. Export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
                field="storage",
            ) from None
        except (boto.HTTPClientError, boto.ConnectionError) as error:
            raise StorageError(
                f"{server} cannot be reached ({type(error).__name__}). Start it or correct the endpoint.",
                field="storage",
            ) from None
        except boto.BotoCoreError as error:
            raise StorageError(
                f"{server} could not {action} s3://{self.bucket}/{key} ({type(error).__name__}). "
                "Check the AWS settings.",
                field="storage",
            ) from None

    def _client_error(self, server: str, action: str, key: str, code: str, status: int) -> MTLSignError:
        location = f"s3://{self.bucket}/{key}"
        if code == "NoSuchBucket":
            problem = f"has no bucket {self.bucket}. Create it or correct the location."
        elif code in ("NoSuchKey", "404", "NotFound"):
            return ArtifactError(f"{location} does not exist. Pass the right location.")
        elif status == 403 or code in _CREDENTIALS:
            problem = (
                f"refused to {action} {location} ({code}). Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            )
        else:
            problem = f"could not {action} {location} ({code or status}). Read the log of the server."
        return StorageError(f"{server} {problem}", field="storage")


def open_s3(uri: str, endpoint: str | None) -> S3Storage:
    """Return the storage at the S3 location `uri`; see `locations.open_storage`."""
    bucket, prefix, options = _split(uri)
    return S3Storage(Connection(*_server(options, endpoint)), bucket, prefix)


def _split(uri: str) -> tuple[str, str, dict[str, str]]:
    # The messages never repeat the location, because it may hold a secret.
    try:
        parts = urlsplit(uri)
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True) if parts.query else []
    except ValueError:
        raise StorageError(
            "The location is not a valid S3 location. Write s3://bucket/prefix.", field="storage"
        ) from None
    options = dict(pairs)
    allowed = {"endpoint_override", "scheme", "region"}
    if "@" in parts.netloc or {"access_key", "secret_key", "session_token"} & options.keys():
        raise StorageError(
            "The location holds credentials. Remove them, and export AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY instead.",
            field="storage",
        )
    if len(options) != len(pairs) or not options.keys() <= allowed or parts.fragment:
        raise StorageError(
            f"The location has an unknown or repeated option. Use only {', '.join(sorted(allowed))}.",
            field="storage",
        )
    prefix = parts.path.strip("/")
    segments = prefix.split("/") if prefix else []
    if any(not _SEGMENT.fullmatch(segment) or segment in (".", "..") for segment in segments):
        raise StorageError(
            "The prefix has a character that is not allowed. Use A-Z a-z 0-9 . _ = + -", field="storage"
        )
    if not _BUCKET.fullmatch(parts.netloc):
        raise StorageError(
            "The bucket name is invalid. Use 3 to 63 of a-z 0-9 . - and write s3://bucket/prefix.",
            field="storage",
        )
    return parts.netloc, prefix, options


def _server(options: Mapping[str, str], setting: str | None) -> tuple[str | None, str, str | None]:
    """Return the endpoint host and port (None: AWS), the scheme and the region (None: the AWS default)."""
    environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    override = options.get("endpoint_override")
    scheme = options.get("scheme")
    endpoints = [_endpoint(text, scheme) for text in (override, setting) if text]
    if len(set(endpoints)) > 1:
        raise StorageError(
            "The location and the endpoint setting name different servers. Name the server once.",
            field="storage",
        )
    if not endpoints and environment:
        endpoints = [_endpoint(environment, scheme)]
    host, server_scheme = endpoints[0] if endpoints else (None, scheme or "https")
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    region = region or ("us-east-1" if host else None)
    if region is not None and not _REGION.fullmatch(region):
        raise StorageError("The region is invalid. Write for instance us-east-1.", field="region")
    return host, server_scheme, region


def _endpoint(text: str, scheme: str | None) -> tuple[str, str]:
    prefix, mark, rest = text.partition("://")
    host, own_scheme = (rest.rstrip("/"), prefix) if mark else (text.rstrip("/"), scheme or "https")
    if (
        not _HOST.fullmatch(host)
        or own_scheme not in ("http", "https")
        or (scheme or own_scheme) != own_scheme
    ):
        raise StorageError(
            "The server address is invalid. Write http://HOST:PORT or https://HOST:PORT.", field="endpoint"
        )
    return host, own_scheme


def s3_uri(bucket: str, prefix: str, host: str | None, scheme: str, region: str | None) -> str:
    """Return the location that states bucket, prefix and server; pyarrow reads it, too.

    Args:
        bucket: the bucket.
        prefix: the prefix without slashes at its ends; may be empty.
        host: host and port of the server; None for AWS.
        scheme: http or https.
        region: the region; None for the AWS default.
    """
    options = {"endpoint_override": host, "scheme": scheme if host else None, "region": region}
    query = urlencode({key: value for key, value in options.items() if value}, safe=":")
    return f"s3://{bucket}{'/' if prefix else ''}{prefix}{'?' if query else ''}{query}"
