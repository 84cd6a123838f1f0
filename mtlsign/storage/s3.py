"""S3 storage through boto3: reading and writing objects, and errors that name their cause."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mtlsign.errors import ArtifactError, MTLSignError, StorageError
from mtlsign.storage.base import LIST_LIMIT, Names, Storage, check_size, validate_name
from mtlsign.storage.s3_location import NOT_IN_A_LOCATION, REGION, choose_server, s3_uri, split_location

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client

_PUT_LIMIT = 5 * 2**30
Statuses = list[int]
#: Cause and fix by the error code of S3.
_CAUSES = {
    **dict.fromkeys(
        ("RequestTimeTooSkewed", "RequestExpired"),
        "because the clock of this machine differs from its own. Set the clock.",
    ),
    **dict.fromkeys(
        ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"),
        "because the session token has expired. Sign in again, and export the new AWS_SESSION_TOKEN with its "
        "two keys.",
    ),
    **dict.fromkeys(
        ("InvalidToken", "UnrecognizedClientException"),
        "because AWS_SESSION_TOKEN does not belong to the keys. Export all three again, or unset the token.",
    ),
    "InvalidAccessKeyId": "because it does not know the key. Correct AWS_ACCESS_KEY_ID.",
    "SignatureDoesNotMatch": "because the signature is wrong. Check AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, which must be of the same pair.",
    **dict.fromkeys(
        ("AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect", "301", "307",
         "IllegalLocationConstraintException"),
        "because the bucket is in another region or on another server. Set AWS_REGION to {region}, or "
        "correct the endpoint.",
    ),
    "SlowDown": "because there are too many requests. Try again later.",
    "QuotaExceeded": "because the quota is used up. Free some space, then repeat the command.",
}  # fmt: skip


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

    def child(self, name: str, *, private: bool = False) -> S3Storage:  # noqa: D102
        key = self._key(name)
        if NOT_IN_A_LOCATION.search(key):
            raise StorageError(f"{name[:80]!r} cannot be part of a location. Use a name without ? # and \\.")
        return S3Storage(self.connection, self.bucket, key)

    def ray_path(self) -> str:  # noqa: D102
        server = self.connection
        return s3_uri(self.bucket, quote(self.prefix), server.host, server.scheme, server.region)

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
                encoding = response.get("ContentEncoding") or "aws-chunked"
                if encoding not in ("aws-chunked", "identity"):
                    raise ArtifactError(
                        f"{self._location(name)} is stored with the Content-Encoding {encoding[:40]!r}. "
                        "Upload the plain file without that header."
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
            raise self._client_error(server, action, key, error.response) from None
        except (boto.NoCredentialsError, boto.PartialCredentialsError):
            raise StorageError(
                "S3 credentials are missing. Export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
                field="storage",
            ) from None
        except boto.SSLError:
            raise StorageError(
                f"{server} does not answer with TLS, or its certificate is not trusted. Write http:// in the "
                "endpoint of a server without TLS, or name the certificate in AWS_CA_BUNDLE.",
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

    def _client_error(self, server: str, action: str, key: str, response: Mapping[str, Any]) -> MTLSignError:
        location = f"s3://{self.bucket}/{key}"
        details = response.get("ResponseMetadata", {})
        status = int(details.get("HTTPStatusCode", 0))
        code = re.sub(r"[^A-Za-z0-9]", "", str(response.get("Error", {}).get("Code", "")))[:64]
        if code == "NoSuchBucket":
            problem = f"has no bucket {self.bucket}. Create it or correct the location."
        elif code in ("NoSuchKey", "404", "NotFound"):
            return ArtifactError(f"{location} does not exist. Pass the right location.")
        elif code in _CAUSES:
            region = str(details.get("HTTPHeaders", {}).get("x-amz-bucket-region", ""))
            region = region if REGION.fullmatch(region) else "the bucket's region"
            cause = _CAUSES[code].format(region=region)
            problem = f"refused to {action} {location} ({code}), {cause}"
        elif status == 403:
            problem = (
                f"refused to {action} {location} ({code}). Check AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, and that the bucket permits this."
            )
        else:
            problem = f"could not {action} {location} ({code or status}). Read the log of the server."
        return StorageError(f"{server} {problem}", field="storage")


def open_s3(uri: str, endpoint: str | None) -> S3Storage:
    """Return the storage at the S3 location `uri`; see `locations.open_storage`."""
    bucket, prefix, options = split_location(uri)
    return S3Storage(Connection(*choose_server(options, endpoint)), bucket, prefix)
