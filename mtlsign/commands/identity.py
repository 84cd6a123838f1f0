"""Command `mtlsign identity`."""

from __future__ import annotations

from mtlsign.config.base import Settings
from mtlsign.config.cli import Output, job
from mtlsign.errors import SettingsError


@job(Settings)
def identity(settings: Settings) -> Output:
    """Create an owner identity in the file `--owner`. An existing file is never replaced."""
    from mtlsign.watermark.keys.identity import Identity, read_passphrase

    if settings.owner is None:
        raise SettingsError("This setting is required. Name the file to write.", field="owner")
    passphrase = read_passphrase(settings.passphrase_file) if settings.passphrase_file else None
    created = Identity.generate()
    created.save(settings.owner, passphrase)
    kind = "encrypted" if passphrase else "NOT encrypted (give --passphrase-file)"
    document = {
        "owner": str(settings.owner),
        "public_key": created.public_key.hex(),
        "encrypted": bool(passphrase),
    }
    text = (
        f"public key {created.public_key.hex()}\n"
        f"identity ({kind}): {settings.owner}\nBack up this file: it decrypts your kits."
    )
    return Output(document, text)
