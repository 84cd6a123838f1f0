"""Locations on S3: bucket, prefix and server."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlencode

from mtlsign.errors import StorageError
from mtlsign.storage.base import validate_name

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
NOT_IN_A_LOCATION = re.compile(r"[?#\\]")
REGION = re.compile(r"[a-z0-9-]{1,64}")


def split_location(uri: str) -> tuple[str, str, dict[str, str]]:
    """Return bucket, prefix and options of an S3 location. Raises `StorageError`."""
    # The messages never repeat the location, because it may hold a secret.
    path, _, query = uri.removeprefix("s3://").partition("?")
    bucket, _, prefix = path.partition("/")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise StorageError(
            "The location is not a valid S3 location. Write s3://bucket/prefix.", field="storage"
        ) from None
    options = dict(pairs)
    allowed = {"endpoint_override", "scheme", "region"}
    if "@" in bucket or {"access_key", "secret_key", "session_token"} & options.keys():
        raise StorageError(
            "The location holds credentials. Remove them, and export AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY instead.",
            field="storage",
        )
    if len(options) != len(pairs) or not options.keys() <= allowed:
        raise StorageError(
            f"The location has an unknown or repeated option. Use only {', '.join(sorted(allowed))}.",
            field="storage",
        )
    if not uri.startswith("s3://") or not _BUCKET.fullmatch(bucket):
        raise StorageError(
            "The bucket name is invalid. Use 3 to 63 of a-z 0-9 . - and write s3://bucket/prefix.",
            field="storage",
        )
    prefix = prefix.strip("/")
    if prefix and (NOT_IN_A_LOCATION.search(prefix) or not _is_safe(prefix)):
        raise StorageError(
            "The prefix has a part or a character that is not allowed. Write folders separated by single "
            "slashes, without '..', control characters, ? # and \\.",
            field="storage",
        )
    return bucket, prefix, options


def _is_safe(name: str) -> bool:
    try:
        validate_name(name)
    except StorageError:
        return False
    return True


def choose_server(options: Mapping[str, str], setting: str | None) -> tuple[str | None, str, str | None]:
    """Return the endpoint host and port (None: AWS), the scheme and the region (None: the AWS default)."""
    environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    override = options.get("endpoint_override")
    scheme = options.get("scheme")
    endpoints = [_endpoint(override, scheme, required=False)] if override else []
    endpoints += [_endpoint(setting, scheme)] if setting else []
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
    if region is not None and not REGION.fullmatch(region):
        raise StorageError("The region is invalid. Write for instance us-east-1.", field="region")
    return host, server_scheme, region


def _endpoint(text: str, scheme: str | None, *, required: bool = True) -> tuple[str, str]:
    prefix, mark, rest = text.partition("://")
    host, own_scheme = (rest.rstrip("/"), prefix) if mark else (text.rstrip("/"), scheme or "https")
    if not mark and required and scheme is None and _HOST.fullmatch(host):
        raise StorageError(
            f"The server address lacks its scheme. Write http://{host} for a server without TLS, or "
            f"https://{host}.",
            field="endpoint",
        )
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
