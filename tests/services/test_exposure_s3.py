"""Check on a real S3 server, without credentials, whether a model is publicly readable."""

from __future__ import annotations

import json

import boto3
import pytest
from botocore.config import Config

from mtlsign.claims.exposure import is_publicly_readable
from mtlsign.errors import StorageError
from mtlsign.storage.locations import open_storage
from tests.helpers import seaweedfs_server

pytestmark = pytest.mark.services


def test_is_publicly_readable_follows_the_bucket_policy(
    s3: seaweedfs_server.S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    bucket = "exposure"
    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        region_name="us-east-1",
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )
    client.create_bucket(Bucket=bucket)
    for folder in ("open/m", "closed/m"):
        storage = open_storage(f"s3://{bucket}/{folder}", endpoint=s3.endpoint)
        storage.write("model.safetensors", b"weights")
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": "*",
                "Action": ["s3:GetObject"],
                "Resource": [f"arn:aws:s3:::{bucket}/open/*"],
            }
        ],
    }
    for folder in ("open/m", "closed/m", "nowhere"):
        assert not is_publicly_readable(f"s3://{bucket}/{folder}", endpoint=s3.endpoint)
    client.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
    readable = [
        is_publicly_readable(f"s3://{bucket}/{location}", endpoint=s3.endpoint)
        for location in ("open/m", "open/m/model.safetensors", "closed/m", "closed/m/model.safetensors")
    ]
    assert readable == [True, True, False, False]
    with pytest.raises(StorageError, match="did not answer"):
        is_publicly_readable(f"s3://{bucket}/open/m", endpoint="http://127.0.0.1:9")
