"""Check for an earlier disclosure of a model. A commitment made after one proves nothing about order."""

from __future__ import annotations

from pathlib import Path

from mtlsign.claims.ledger.view import LedgerView
from mtlsign.claims.statements.types import Claim, Exhibit, Register
from mtlsign.errors import StorageError
from mtlsign.storage.locations import open_file

_PUBLIC_FOLDERS = {"public", "public_html", "htdocs", "wwwroot"}


def first_disclosure(view: LedgerView, digest: bytes) -> int | None:
    """Return the index of the first entry of a ledger that names the model's digest openly, or None."""
    for entry in view.entries.values():
        statement = entry.statement
        if isinstance(statement, Register) and digest in [d for _, d in statement.models]:
            return entry.index
        if isinstance(statement, Claim) and digest in (statement.suspect, statement.model):
            return entry.index
        if isinstance(statement, Exhibit) and statement.model == digest:
            return entry.index
    return None


def is_publicly_readable(location: str, *, endpoint: str | None = None) -> bool:
    """Return whether the model at `location` can be read without credentials.

    On S3, an unsigned request for the model decides. A local model counts as public if it is below a folder
    named `public`, `public_html`, `htdocs` or `wwwroot`; nothing else can be determined locally.

    Raises:
        StorageError: the location is malformed, or the server does not answer.
    """
    if not location.startswith("s3:"):
        return bool(_PUBLIC_FOLDERS & set(Path(location).resolve().parts))
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
        raise StorageError(f"{location} is not an S3 location. Use s3://BUCKET/PREFIX.", field="model")
    config = Config(
        signature_version=UNSIGNED,
        s3={"addressing_style": "path"},
        connect_timeout=3,
        read_timeout=5,
        retries={"total_max_attempts": 2, "mode": "standard"},
        ignore_configured_endpoint_urls=True,  # type: ignore[call-arg]  # the stubs lack it
    )
    connection = storage.connection
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=f"{connection.scheme}://{connection.host}" if connection.host else None,
        region_name=connection.region or "us-east-1",
        config=config,
    )
    try:
        client.head_object(Bucket=storage.bucket, Key=f"{storage.prefix}/{name}" if storage.prefix else name)
    except ClientError:
        return False
    except BotoCoreError as error:
        raise StorageError(
            f"The server did not answer whether {location} is public: {error}. Check the endpoint.",
            field="model",
        ) from None
    return True
