"""mtlsign.config.base."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mtlsign.errors import SettingsError

MAX_CONFIG_BYTES = 256 * 1024


class Settings(BaseModel):
    """What every job shares. Unknown fields are refused with the nearest known name."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    # fmt: off
    owner: Path | None = Field(None, description="owner identity file; made once outside the storage if absent")
    passphrase_file: Path | None = Field(None, description="file whose first line opens the owner identity")
    endpoint: str | None = Field(None, max_length=512, description="S3 endpoint URL, for pyarrow and boto3 alike")
    json_output: bool = Field(False, alias="json", description="print the result as one JSON document, nothing else")
    quiet: bool = Field(False, description="print only the result")
    # fmt: on

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Validate a mapping. Raises `SettingsError` in one line that names the field and the fix."""
        known = {(f.alias or name) for name, f in cls.model_fields.items()}
        for name in values:
            if name not in known:
                raise SettingsError(f"unknown setting; {nearest(name, known)}", field=str(name))
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "settings"
            hidden = first["input"] is None or not first["loc"] or first["loc"][0] in _secrets(cls)
            shown = "" if hidden else f" (got {str(first['input'])[:60]!r})"
            raise SettingsError(f"{first['msg']}{shown}", field=field.replace("_", "-")) from None


def _secrets(kind: type[Settings]) -> set[str]:
    return {f.alias or name for name, f in kind.model_fields.items() if "SecretStr" in str(f.annotation)}


def nearest(name: str, known: set[str]) -> str:
    """A hint for a misspelt name."""
    close = difflib.get_close_matches(str(name).replace("-", "_"), known, n=1, cutoff=0.4)
    return f"did you mean {close[0].replace('_', '-')!r}?" if close else "see --help for the list"


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML mapping of settings (at most 256 KiB). Raises `SettingsError`."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise SettingsError(
            f"cannot be read ({error.strerror}); give the path of a YAML file", field="config"
        ) from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise SettingsError(f"is over {MAX_CONFIG_BYTES} bytes; settings are a short mapping", field="config")
    try:
        loaded = yaml.safe_load(raw.decode())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f" in line {line + 1}" if line is not None else ""
        raise SettingsError(
            f"is not YAML{where}; write lines such as 'lambda1: 0.02'", field="config"
        ) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise SettingsError(
            "is not a mapping of names to values; write lines such as 'lambda1: 0.02'", field="config"
        )
    return {name.replace("-", "_"): value for name, value in loaded.items()}


def dump(settings: Settings) -> bytes:
    """The settings as JSON bytes, as kept beside a run (they hold no secret)."""
    return json.dumps(settings.model_dump(mode="json", by_alias=True), indent=1, sort_keys=True).encode()
