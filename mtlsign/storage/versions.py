"""Documents of version 0 of the formats: each is refused with one line that names the version found."""

from __future__ import annotations

import re
from typing import NoReturn

from mtlsign.errors import OldVersionError

EMBED_AGAIN = "Embed the watermark again."
PUBLISH_AGAIN = "Create a new ledger and publish again."

_TAG = re.compile(r"(?:urn:)?mtlsign(?:/[a-z-]+)?[/:]v0(?:[/:].{0,100})?")


def refuse_version_0(document: object, name: str, *, where: str, fix: str) -> None:
    """Refuse a parsed JSON document of version 0.

    Args:
        document: the JSON value; any value that is no object with a tag of version 0 passes.
        name: the field that holds the format's tag.
        where: the field that errors name.
        fix: sentence with the remedy.

    Raises:
        OldVersionError: the document has version 0.
    """
    tag = document.get(name) if isinstance(document, dict) else None
    if isinstance(tag, str) and _TAG.fullmatch(tag):
        raise_old_version(tag, where=where, fix=fix)


def raise_old_version(tag: str, *, where: str, fix: str) -> NoReturn:
    """Raise `OldVersionError`.

    Args:
        tag: the format's tag in the document.
        where: the field that the error names.
        fix: sentence with the remedy.
    """
    problem = f"The format is {tag!r}, version 0, which this release does not read"
    raise OldVersionError(problem, fix, field=where)
