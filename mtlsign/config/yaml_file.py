"""Settings in a YAML file (`--config FILE`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mtlsign.errors import SettingsError

MAX_CONFIG_BYTES = 256 * 1024


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML mapping of settings (at most 256 KiB). Raises `SettingsError`."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise SettingsError(
            f"The file {str(path)[:200]!r} cannot be read ({error.strerror}). Give the path of a YAML file.",
            field="config",
        ) from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise SettingsError(
            f"The file is over {MAX_CONFIG_BYTES} bytes. Settings are a short mapping.", field="config"
        )
    try:
        loaded = yaml.safe_load(raw.decode())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        position = f" (line {line + 1})" if line is not None else ""
        raise SettingsError(
            f"The file is not YAML{position}. Write lines such as 'lambda1: 0.02'.", field="config"
        ) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise SettingsError(
            "The file is not a mapping of names to values. Write lines such as 'lambda1: 0.02'.",
            field="config",
        )
    return _with_underscores(loaded)


def _with_underscores(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace hyphens in names, also in those of nested mappings."""
    return {
        str(name).replace("-", "_"): _with_underscores(value) if isinstance(value, dict) else value
        for name, value in values.items()
    }
