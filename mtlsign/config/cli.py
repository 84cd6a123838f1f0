"""How a job meets the terminal: flags from a settings class, one live line, exit codes.

0 = it ran (a verdict, whatever it says, is in the output); 2 = bad input or an unreachable service, told in
one line; 1 = a bug, with its traceback; 130 = interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mtlsign.config.base import Settings, nearest, read_config
from mtlsign.errors import MTLSignError, SettingsError

S = TypeVar("S", bound=Settings)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see --help")


def parse(
    kind: type[S], argv: Sequence[str], *, description: str, aliases: Mapping[str, str] | None = None
) -> S:
    """Settings from flags and, below them, `--config FILE`. Raises `SettingsError` with the nearest name."""
    parser = _Parser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="YAML file with any of these settings; flags win over it")
    names = {}
    for field, info in kind.model_fields.items():
        name = info.alias or field
        names[name] = field
        flag = "--" + name.replace("_", "-")
        default = (
            ""
            if info.is_required() or info.default is None or info.default is False
            else f" [{info.default}]"
        )
        text = (info.description or "").replace("%", "%%") + default
        if info.annotation is bool:
            parser.add_argument(
                flag, dest=name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            many = "append" if (aliases or {}).get(name) == "append" else "store"
            metavar = _metavar(info.annotation)
            parser.add_argument(
                flag, dest=name, default=argparse.SUPPRESS, metavar=metavar, help=text, action=many
            )
    given, unknown = parser.parse_known_args(list(argv))
    if unknown:
        word = unknown[0].lstrip("-").split("=")[0]
        raise SettingsError(
            f"unknown setting; {nearest(word, set(names) | {'config'})}", field=unknown[0].split("=")[0]
        )
    values = vars(given)
    config = values.pop("config", None)
    values = {name: ",".join(value) if isinstance(value, list) else value for name, value in values.items()}
    return kind.of({**(read_config(config) if config else {}), **values})


def _metavar(annotation: Any) -> str:
    args = [a for a in typing.get_args(annotation) if a is not type(None)]
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (types.UnionType, typing.Union) and len(args) == 1:
        return _metavar(args[0])
    return {int: "INT", float: "FLOAT", str: "TEXT", Path: "FILE"}.get(annotation, "VALUE")


def run(
    main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None, *, resumes: bool = False
) -> NoReturn:
    """Call `main(argv)` and turn its outcome into an exit code (see the module's docstring).

    `resumes` says that the job has `--resume`, which is told to whoever interrupts it.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
    except MTLSignError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        how = "; a run goes on with --resume NAME" if resumes else ""
        print(f"interrupted{how}", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(0)
