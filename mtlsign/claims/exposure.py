"""Has a model already left? A commitment made after that proves nothing about who was first."""

from __future__ import annotations

from pathlib import Path

from mtlsign.claims.ledger.view import LedgerView
from mtlsign.claims.statements.types import Claim, Exhibit, Register
from mtlsign.errors import StorageError
from mtlsign.storage.locations import open_file

_PUBLIC = {"public", "public_html", "htdocs", "wwwroot"}


def first_disclosure(view: LedgerView, digest: bytes) -> int | None:
    """The first entry of a ledger that names the model openly."""
    for entry in view.entries.values():
        said = entry.statement
        if isinstance(said, Register) and digest in [d for _, d in said.models]:
            return entry.index
        if isinstance(said, Claim) and digest in (said.suspect, said.model):
            return entry.index
        if isinstance(said, Exhibit) and said.model == digest:
            return entry.index
    return None


def is_publicly_readable(location: str, *, endpoint: str | None = None) -> bool:
    """Whether anybody can read the model where it lies.

    On S3: a request for it without any credentials is answered. A local folder: it lies below one that is
    called `public`, `public_html`, `htdocs` or `wwwroot`; more cannot be known from here.

    Raises:
        StorageError: a malformed location, or a server that does not answer.
    """
    if not location.startswith("s3:"):
        return bool(_PUBLIC & set(Path(location).resolve().parts))
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    from mtlsign.storage.model_folder import MODEL_FILE
    from mtlsign.storage.s3 import S3Storage

    path, mark, query = location.partition("?")
    if not path.endswith(".safetensors"):
        path = f"{path.rstrip('/')}/{MODEL_FILE}"
    storage, name = open_file(path + mark + query, endpoint=endpoint)
    if not isinstance(storage, S3Storage):
        raise StorageError(f"{location} is no S3 location; mend it", field="model")
    config = Config(
        signature_version=UNSIGNED,
        s3={"addressing_style": "path"},
        connect_timeout=3,
        read_timeout=5,
        retries={"total_max_attempts": 2, "mode": "standard"},
        ignore_configured_endpoint_urls=True,  # type: ignore[call-arg]  # the stubs lack it
    )
    at = storage.connection
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=f"{at.scheme}://{at.host}" if at.host else None,
        region_name=at.region or "us-east-1",
        config=config,
    )
    try:
        client.head_object(Bucket=storage.bucket, Key=f"{storage.prefix}/{name}" if storage.prefix else name)
    except ClientError:
        return False
    except BotoCoreError as error:
        raise StorageError(f"cannot ask whether {location} is public: {error}", field="model") from None
    return True
