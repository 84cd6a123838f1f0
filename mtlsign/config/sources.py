"""Sources of settings besides Python: command-line flags, environment variables and a YAML file.

Flags take precedence over the environment, the environment over the file, and the file over the defaults.
pydantic-settings reads flags and environment; this module keeps its help short and its errors on one line.
"""

from __future__ import annotations

import argparse
import json
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

from pydantic_settings import CliSettingsSource, EnvSettingsSource
from pydantic_settings import SettingsError as MalformedVariableError

from mtlsign._version import __version__
from mtlsign.config.base import (
    Settings,
    field_info,
    flatten,
    group_of,
    refuse_secrets,
    setting_names,
    unknown_setting,
)
from mtlsign.config.yaml_file import read_config
from mtlsign.errors import SettingsError

PREFIX = "MTLSIGN_"
#: pydantic-settings turns this text into None; no flag has it as a value.
_NONE_TEXT = "\x00"
_TYPE_NAMES = {int: "INT", float: "FLOAT", str: "TEXT", Path: "FILE"}


def environment(kind: type[Settings]) -> dict[str, Any]:
    """Return the settings that `MTLSIGN_*` variables give, as nested mappings.

    Raises:
        SettingsError: a variable has an old name, or that of a group is not a JSON object.
    """
    for old, new in kind.renamed.items():
        variable = PREFIX + old.upper()
        if variable in os.environ and new in setting_names(kind):
            current = PREFIX + new.upper().replace(".", "__")
            raise SettingsError(f"The variable {variable} was renamed. Set {current}.", field="environment")
    source = EnvSettingsSource(
        cast(Any, kind), env_prefix=PREFIX, env_prefix_target="all", env_nested_delimiter="__"
    )
    try:
        return source()
    except MalformedVariableError:
        groups = [name for name, info in kind.model_fields.items() if group_of(info.annotation)]
        variables = ", ".join(f"{PREFIX}{name.upper()}" for name in groups)
        raise SettingsError(
            f"A variable among {variables} is not a JSON object. Set single settings, such as "
            f"{PREFIX}PHASE1__EPOCHS, instead.",
            field="environment",
        ) from None


def command_line(
    kind: type[Settings], argv: Sequence[str], *, description: str, program: str
) -> dict[str, Any]:
    """Return the settings of all sources, by dotted name.

    Args:
        kind: the settings class.
        argv: arguments of the command line.
        description: text above the list of settings in the help.
        program: name of the program in the help.

    Raises:
        SettingsError: a flag is unknown, lacks its value or holds a secret, or the file cannot be read.
        SystemExit: the help was requested and printed.
    """
    reader = _FlagReader(kind, show_all="--help-all" in argv, description=description, program=program)
    flags = reader.read(argv)
    from_file = read_config(reader.config) if reader.config is not None else {}
    for values in (flags, from_file):
        refuse_secrets(kind, values)
    merged: dict[str, Any] = {}
    for values in (from_file, environment(kind), flags):
        merged |= flatten(kind, values)
    return merged


class _Parser(argparse.ArgumentParser):
    """Parser whose errors are settings errors."""

    def error(self, message: str) -> NoReturn:
        """Raise `SettingsError` instead of printing the usage."""
        raise SettingsError(f"{message[:1].upper()}{message[1:]}. See --help.")


@dataclass
class _FlagReader:
    """Command-line flags of one settings class; `config` is the file of `--config` after reading."""

    kind: type[Settings]
    show_all: bool
    description: str
    program: str
    config: Path | None = None
    _flags: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = field(default_factory=dict)

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the settings that the flags give, as nested mappings."""
        source: Any = CliSettingsSource(
            cast(Any, self.kind),
            root_parser=_Parser(add_help=False),
            cli_parse_args=list(argv),
            cli_parse_none_str=_NONE_TEXT,
            cli_avoid_json=True,
            cli_implicit_flags=True,
            cli_kebab_case=True,
            cli_exit_on_error=False,
            parse_args_method=self._parse,
            add_argument_method=self._remember,
        )
        values: dict[str, Any] = source()
        return values

    def _remember(self, _: Any, *flags: str, **options: Any) -> None:
        """Collect the definition of a flag; `_parse` adds all of them in the order of the help."""
        self._flags[flags[0].lstrip("-").replace("-", "_")] = (flags, options)

    def _parse(self, _: Any, argv: Sequence[str], __: Any = None) -> argparse.Namespace:
        """Parse the flags. A repeated flag gives a JSON list where the setting is a list, else its last value."""
        names = setting_names(self.kind)
        parsed, unknown = self._parser().parse_known_args(argv)
        if unknown:
            flag = unknown[0].split("=")[0]
            if not flag.startswith("--"):
                raise SettingsError(f"The argument {unknown[0][:80]!r} is not a flag. See --help.")
            raise unknown_setting(flag.lstrip("-"), self.kind, flag)
        self.config = parsed.config
        values = argparse.Namespace()
        for name, value in vars(parsed).items():
            if name in names:
                is_list = _is_list(field_info(self.kind, names[name]).annotation)
                setattr(values, name, json.dumps(value) if is_list else value)
        return values

    def _parser(self) -> _Parser:
        """Return a parser with all flags: the common ones first, the others under the title of their group."""
        parser = _Parser(
            prog=self.program, description=self.description, allow_abbrev=False, add_help=False,
            usage="%(prog)s [--config FILE] [--NAME VALUE]…",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        general = parser.add_argument_group("general")
        general.add_argument("--help", "-h", action="help", help="show the common settings and exit")
        general.add_argument(
            "--version", action="version", version=f"mtlsign {__version__}", help="show the version and exit"
        )
        general.add_argument("--help-all", action="help", help="show all settings and exit")
        general.add_argument(
            "--config", type=Path, metavar="FILE", default=None,
            help="YAML file of settings; flags and MTLSIGN_* variables take precedence",
        )  # fmt: skip
        known = setting_names(self.kind)
        common = [name for name in self.kind.common if name in known]
        groups = {"": parser.add_argument_group("common settings")}
        for name in [*common, *(name for name in known if name not in common)]:
            group_name = "" if name in common else name.rpartition(".")[0] or "other settings"
            if group_name not in groups:
                groups[group_name] = parser.add_argument_group(group_name, self._group_text(group_name))
            self._add(groups[group_name], name, known[name], hidden=bool(common) and name not in common)
        return parser

    def _group_text(self, name: str) -> str | None:
        """Return the description of a group of settings; the short help has none."""
        info = self.kind.model_fields.get(name)
        return info.description if self.show_all and info is not None and group_of(info.annotation) else None

    def _add(self, group: Any, name: str, field_name: str, *, hidden: bool) -> None:
        """Add one flag."""
        flags, options = self._flags[name]
        info = field_info(self.kind, field_name)
        text = (info.description or "").replace("%", "%%") + _default_text(info)
        options = {
            "dest": name,
            "default": argparse.SUPPRESS,
            "help": argparse.SUPPRESS if (hidden and not self.show_all) or _is_secret(info) else text,
        }
        if info.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["action"] = "append" if _is_list(info.annotation) else "store"
            options["metavar"] = _type_name(info.annotation)
        group.add_argument(*flags[:1], **options)


def _is_list(annotation: Any) -> bool:
    """Return whether the setting is a list of values."""
    return typing.get_origin(annotation) is tuple


def _is_secret(info: Any) -> bool:
    return "SecretStr" in str(info.annotation)


def _default_text(info: Any) -> str:
    """Return the default in brackets, unless the description explains it."""
    if info.is_required():
        return " [required]"
    if info.default in (None, False, (), "") or (info.description or "").endswith("]"):
        return ""
    value = ",".join(map(str, info.default)) if isinstance(info.default, tuple) else info.default
    return f" [{value}]"


def _type_name(annotation: Any) -> str:
    """Return the placeholder of a value in the help."""
    members = [a for a in typing.get_args(annotation) if a is not type(None) and a is not Ellipsis]
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return "|".join(map(str, members))
    if origin in (types.UnionType, typing.Union) and len(members) == 1:
        return _type_name(members[0])
    if origin is tuple:
        return "KINDS" if typing.get_origin(members[0]) is typing.Literal else "TEXT"
    return _TYPE_NAMES.get(annotation, "VALUE")
