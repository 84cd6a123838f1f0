"""Make an owner identity for a cluster: `python jobs/identity.py --owner FILE --passphrase-file FILE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from mtlsign.config import cli
from mtlsign.config.base import Settings
from mtlsign.errors import SettingsError
from mtlsign.reports import console
from mtlsign.watermark.keys.identity import Identity, read_passphrase


def main(argv: Sequence[str]) -> None:
    """Write a new identity; an existing file is never overwritten."""
    settings = cli.parse(Settings, argv, description=__doc__ or "")
    if settings.owner is None:
        raise SettingsError("is required: the file to write", field="owner")
    passphrase = read_passphrase(settings.passphrase_file) if settings.passphrase_file else None
    identity = Identity.generate()
    identity.save(settings.owner, passphrase)
    kind = "encrypted" if passphrase else "NOT encrypted (give --passphrase-file)"
    if settings.json_output:
        console.print_json(
            {
                "owner": str(settings.owner),
                "public_key": identity.public_key.hex(),
                "encrypted": bool(passphrase),
            }
        )
    else:
        print(
            f"public key {identity.public_key.hex()}\n"
            f"identity ({kind}): {settings.owner}\nback it up: it opens your kits"
        )


if __name__ == "__main__":
    cli.run(main)
