"""Base classes of all settings: validation of a mapping, nested groups, JSON dumps.

A setting has one name everywhere: `phase1.epochs` in Python mappings and search spaces, `--phase1.epochs` on the
command line, `phase1: {epochs: …}` in YAML, `MTLSIGN_PHASE1__EPOCHS` in the environment.
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import NoDecode

from mtlsign.errors import SettingsError

#: Pattern of the name of a run: one path component.
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"
#: What a value of a pattern is, for errors, which would otherwise quote the pattern.
_FORMS = {
    RUN_NAME: "A name begins with a letter or a digit, and has at most 100 letters, digits, '.', '_' and '-'.",
}


def as_tuple(value: Any) -> Any:
    """Turn one string into a tuple of one, and a JSON list (environment variables hold text) into a tuple."""
    if not isinstance(value, str):
        return value
    if value.startswith("["):
        try:
            return tuple(json.loads(value))
        except (ValueError, TypeError):
            return (value,)
    return (value,) if value else ()


#: A list of texts. On the command line the flag is repeated; a text may contain commas.
Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(as_tuple)]


def named_values(pairs: Collection[str]) -> dict[str, str]:
    """Return the settings that `--set NAME=VALUE` gives, by name. Raises `SettingsError`."""
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise SettingsError(f"{pair[:60]!r} is not NAME=VALUE. Write --set phase1.epochs=6.", field="set")
        values[name.strip().replace("-", "_")] = value.strip()
    return values


class SettingsGroup(BaseModel):
    """Group of settings that belong together, such as those of one training phase."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Settings(BaseModel):
    """Settings that every job has. An unknown name is an error that names the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    #: Old names of renamed settings and their new names (`mtlsign.config.renamed`).
    renamed: ClassVar[Mapping[str, str]] = {}
    #: Settings that `--help` lists; `--help-all` lists every one.
    common: ClassVar[tuple[str, ...]] = ()
    #: Settings that may change when a run is resumed: they do not affect the results.
    resumable: ClassVar[frozenset[str]] = frozenset(
        ("owner", "passphrase_file", "endpoint", "json_output", "quiet")
    )

    # fmt: off
    owner: Path | None = Field(None, description="owner identity file; created outside the storage if absent")
    passphrase_file: Path | None = Field(None, description="file whose first line decrypts the owner identity")
    endpoint: str | None = Field(None, max_length=512, description="URL of the S3 endpoint")
    json_output: bool = Field(False, alias="json", description="print the result as one JSON document and nothing else")
    quiet: bool = Field(False, description="print only the result")
    # fmt: on

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Validate a mapping of settings.

        Args:
            values: settings by name; those of a group as a nested mapping or as dotted names.

        Returns:
            The validated settings; settings that are absent have their defaults.

        Raises:
            SettingsError: a name is unknown or a value is invalid; the message names the field and the fix.
        """
        leaves, known = flatten(cls, values), setting_names(cls)
        for name in leaves:
            if name not in known:
                raise unknown_setting(name, cls)
        try:
            return cls.model_validate(_nested(leaves))
        except ValidationError as error:
            raise _as_settings_error(error, cls) from None

    def value_of(self, name: str) -> Any:
        """Return one setting by its dotted field name."""
        value: Any = self
        for part in name.split("."):
            value = getattr(value, part)
        return value

    def given_values(self) -> dict[str, Any]:
        """Return the settings that were set explicitly, by dotted field name."""
        explicit: dict[str, Any] = {}
        for name in sorted(self.model_fields_set):
            value = getattr(self, name)
            if isinstance(value, SettingsGroup):
                explicit |= {
                    f"{name}.{member}": getattr(value, member) for member in sorted(value.model_fields_set)
                }
            else:
                explicit[name] = value
        return explicit

    def flat_dump(self) -> dict[str, Any]:
        """Return all settings as JSON values, by dotted field name."""
        flat: dict[str, Any] = {}
        for name, value in self.model_dump(mode="json").items():
            if group_of(type(self).model_fields[name].annotation):
                flat |= {f"{name}.{member}": item for member, item in value.items()}
            else:
                flat[name] = value
        return flat

    def flags(self, *, without: Collection[str] = ()) -> list[str]:
        """Return the command-line flags of the settings that differ from their defaults.

        Args:
            without: settings to leave out, by dotted field name.
        """
        words: list[str] = []
        for name, field in setting_names(type(self)).items():
            value, flag = self.value_of(field), name.replace("_", "-")
            if field in without or value == field_info(type(self), field).default:
                continue
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                for item in value if isinstance(value, tuple) else (value,):
                    words += [f"--{flag}", str(item)]
        return words

    def resume_flags(self, run: str) -> str:
        """Return the flags that continue a run: its name, and workers and storage if not the defaults."""
        flags = ["--resume", run]
        for name in ("workers", "storage"):
            field = type(self).model_fields.get(name)
            if field is not None and getattr(self, name) != field.default:
                flags += [f"--{name}", shlex.quote(str(getattr(self, name)))]
        return " ".join(flags)

    def updated(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with other values for some dotted field names. The values are not validated again."""
        update: dict[str, Any] = {}
        for name, value in changes.items():
            group, _, member = name.rpartition(".")
            if group:
                previous: SettingsGroup = update.get(group, getattr(self, group))
                update[group] = previous.model_copy(update={member: value})
            else:
                update[name] = value
        return self.model_copy(update=update)

    def resumed_with(self, changes: Self, run: str) -> Self:
        """Return the settings of a stored run with the changes that its resumption asks for.

        Args:
            changes: settings of the resuming job; only those set explicitly count.
            run: name of the run, for the error message.

        Raises:
            SettingsError: a setting that affects the results differs from the stored run.
        """
        explicit = changes.given_values()
        public_names = {field: name for name, field in setting_names(type(self)).items()}
        for name, value in explicit.items():
            if name not in self.resumable and value != self.value_of(name):
                raise SettingsError(
                    f"Run {run!r} has the value {self.value_of(name)}. Omit the flag or start a new run.",
                    field=public_names[name].replace("_", "-"),
                )
        return self.updated({name: value for name, value in explicit.items() if name in self.resumable})


def setting_names(kind: type[BaseModel]) -> dict[str, str]:
    """Return the public names of all settings, with the dotted field name of each."""
    names: dict[str, str] = {}
    for field, info in kind.model_fields.items():
        if group := group_of(info.annotation):
            names |= {f"{field}.{name}": f"{field}.{member}" for name, member in setting_names(group).items()}
        else:
            names[info.alias or field] = field
    return names


def field_info(kind: type[BaseModel], name: str) -> FieldInfo:
    """Return the definition of a setting by its dotted field name."""
    group, _, member = name.rpartition(".")
    owner = group_of(kind.model_fields[group].annotation) if group else kind
    assert owner is not None
    return owner.model_fields[member]


def group_of(annotation: Any) -> type[SettingsGroup] | None:
    """Return the class of a group of settings, or None for the annotation of a single setting."""
    is_group = isinstance(annotation, type) and issubclass(annotation, SettingsGroup)
    return annotation if is_group else None


def unknown_setting(name: str, kind: type[Settings], flag: str | None = None) -> SettingsError:
    """Return the error for an unknown name: its new name if it was renamed, else the nearest name.

    Args:
        name: the unknown name.
        kind: the settings class.
        flag: the name as the caller wrote it, if it differs.
    """
    key = name.replace("-", "_")
    if key in kind.renamed:
        return SettingsError(
            f"This setting was renamed. Use {kind.renamed[key].replace('_', '-')!r}.", field=flag or name
        )
    return SettingsError(f"Unknown setting. {nearest(name, set(setting_names(kind)))}", field=flag or name)


def nearest(name: str, known: set[str], otherwise: str = "See --help-all for the list.") -> str:
    """Return a hint with the known name that resembles a misspelt one most.

    Args:
        name: the misspelt name.
        known: the known names.
        otherwise: hint if no known name resembles it.
    """
    key = str(name).replace("-", "_")
    by_member = {dotted.rpartition(".")[2]: dotted for dotted in sorted(known)}
    close = difflib.get_close_matches(key, sorted({*known, *by_member}), n=1, cutoff=0.4)
    if not close:
        return otherwise
    return f"Did you mean {by_member.get(close[0], close[0]).replace('_', '-')!r}?"


def flatten(kind: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every setting by its dotted name.

    Args:
        kind: the settings class, which defines the groups.
        values: settings by name; those of a group as a nested mapping or as dotted names.
        prefix: dotted name of the enclosing group.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        info = kind.model_fields.get(name) if isinstance(name, str) else None
        group = group_of(info.annotation) if info is not None else None
        if group is not None and isinstance(value, SettingsGroup):
            value = {member: getattr(value, member) for member in value.model_fields_set}
        if group is not None and isinstance(value, Mapping):
            flat |= flatten(group, value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings for dotted names."""
    nested: dict[str, Any] = {}
    for name, value in leaves.items():
        group, _, member = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[member] = value
    return nested


def _as_settings_error(error: ValidationError, kind: type[Settings]) -> SettingsError:
    """Turn the first problem that pydantic found into one line. A secret value is never shown."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "settings"
    missing = first["type"] == "missing"
    others = [
        f"--{str(each['loc'][0]).replace('_', '-')}"
        for each in error.errors(include_url=False, include_context=False)[1:]
        if each["type"] == "missing"
    ]
    hidden = missing or first["input"] is None or not first["loc"] or first["loc"][0] in secret_names(kind)
    value = "" if hidden else f" (got {str(first['input'])[:60]!r})"
    message = (
        f"This setting{', like ' + ' and '.join(others) + ',' if others else ''} is required. See --help."
        if missing
        else _FORMS.get(str(first.get("ctx", {}).get("pattern")), first["msg"].removeprefix("Value error, "))
    )
    return SettingsError(f"{message}{value}", field=field.replace("_", "-"))


def secret_names(kind: type[Settings]) -> set[str]:
    """Return the names of the settings whose values must never be shown."""
    return {f.alias or name for name, f in kind.model_fields.items() if "SecretStr" in str(f.annotation)}


def refuse_secrets(kind: type[Settings], values: Mapping[str, Any]) -> None:
    """Raise `SettingsError` if the mapping holds a secret: files and flags are readable by others."""
    for name in sorted(secret_names(kind) & {name for name, value in values.items() if value is not None}):
        raise SettingsError(
            f"This setting is a secret. Pass it in the environment as MTLSIGN_{name.upper()}, never as a flag or "
            "in a file.",
            field=name.replace("_", "-"),
        )


def dump(settings: Settings) -> bytes:
    """Return the settings as the JSON bytes of a run's `settings.json`; they contain no secret."""
    return json.dumps(settings.model_dump(mode="json", by_alias=True), indent=1, sort_keys=True).encode()
