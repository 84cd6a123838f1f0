"""Tests of the error messages of S3 storage, with the client's own stub instead of a server."""

from __future__ import annotations

import io
from typing import Any

import botocore.exceptions as boto
import pytest
from botocore.response import StreamingBody
from botocore.stub import Stubber

from mtlsign.errors import ArtifactError, StorageError
from mtlsign.storage.s3 import S3Storage, open_s3


@pytest.fixture(scope="module")
def store() -> S3Storage:
    """Return one storage with its client, which takes seconds to create."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "some-id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "some-secret")
        opened = open_s3("s3://bucket/a folder", "https://s3.example:9000")
        assert opened.connection.client
    return opened


def error_of(store: S3Storage, code: str, status: int, headers: dict[str, str] | None = None) -> str:
    with Stubber(store.connection.client) as stub:
        meta: dict[str, Any] = {"HTTPHeaders": headers or {}}
        stub.add_client_error("get_object", code, "text of the server", status, response_meta=meta)
        with pytest.raises(StorageError) as caught:
            store.read("x ü.safetensors", 10)
    assert caught.value.field == "storage" and "text of the server" not in str(caught.value)
    return caught.value.detail


@pytest.mark.parametrize(
    ("code", "status", "parts"),
    [
        ("RequestTimeTooSkewed", 403, ("clock of this machine", "Set the clock.")),
        ("ExpiredToken", 400, ("session token has expired", "new AWS_SESSION_TOKEN")),
        ("InvalidToken", 400, ("AWS_SESSION_TOKEN does not belong", "unset the token")),
        ("InvalidAccessKeyId", 403, ("does not know the key", "Correct AWS_ACCESS_KEY_ID")),
        ("SignatureDoesNotMatch", 403, ("signature is wrong", "must be of the same pair")),
        ("AccessDenied", 403, ("Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "bucket permits")),
        ("NoSuchBucket", 404, ("has no bucket bucket", "Create it")),
        ("SlowDown", 503, ("too many requests", "Try again later")),
    ],
)
def test_read_refused_by_server_names_cause_and_remedy(
    code: str, status: int, parts: tuple[str, ...], store: S3Storage
) -> None:
    message = error_of(store, code, status)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("code", "status"), [("AuthorizationHeaderMalformed", 400), ("PermanentRedirect", 301)]
)
def test_read_in_wrong_region_names_region_of_bucket(code: str, status: int, store: S3Storage) -> None:
    message = error_of(store, code, status, {"x-amz-bucket-region": "eu-central-1"})
    assert "another region" in message and "Set AWS_REGION to eu-central-1" in message
    assert "Set AWS_REGION to the bucket's region" in error_of(store, code, status)


def test_read_from_server_without_tls_names_scheme(store: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def get_object(**_: Any) -> None:
        raise boto.SSLError(endpoint_url="https://s3.example:9000", error="WRONG_VERSION_NUMBER")

    monkeypatch.setattr(store.connection.client, "get_object", get_object)
    with pytest.raises(StorageError, match=r"does not answer with TLS.*Write http://"):
        store.read("x", 10)


def test_read_of_compressed_object_names_its_encoding(store: S3Storage) -> None:
    with Stubber(store.connection.client) as stub:
        body = StreamingBody(io.BytesIO(b"12"), 2)
        response = {"Body": body, "ContentLength": 2, "ContentEncoding": "gzip"}
        stub.add_response("get_object", response, {"Bucket": "bucket", "Key": "a folder/x"})
        with pytest.raises(ArtifactError, match=r"Content-Encoding 'gzip'\. Upload the plain file"):
            store.read("x", 10)
