"""The commands of `mtlsign`: each one turns settings into one call of the package and prints its result.

`jobs/*.py` are the same commands as files for `ray job submit`. This is the top layer: only commands import
`mtlsign.distributed`, inside their functions, so that a mistyped flag is reported before torch is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from mtlsign._version import __version__
from mtlsign.config import cli
from mtlsign.config.base import nearest
from mtlsign.errors import SettingsError

#: Command, module of `mtlsign.commands` and summary.
COMMANDS = {
    "embed": ("embed", "embed a watermark into a network"),
    "verify": ("verify", "verify models against an owner kit, or the bundle of a claim"),
    "convert": ("convert", "convert weights of another format to safetensors"),
    "trace": ("trace", "find the recipients whose copies a model was made from"),
    "attack": ("attack", "attack a marked model and verify what remains"),
    "sweep": ("sweep", "embed over a grid of settings"),
    "reproduce": ("reproduce", "repeat the studies of the paper"),
    "identity": ("identity", "create an owner identity"),
    "publish": ("claims", "commit to a marked model before its release"),
    "claim": ("claims", "open a key against a suspect model"),
    "council": ("claims", "act as a member of the council"),
    "dispute": ("claims", "resolve a dispute between claims"),
    "ledger": ("claims", "create, read and check a ledger"),
    "serve": ("service", "start the verification service"),
    "verify-batch": ("service", "verify a file of claims"),
}


def usage() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "usage: mtlsign COMMAND [--help] [--NAME VALUE]…\n\ncommands:\n" + "\n".join(lines)


def command(name: str) -> cli.Job[Any]:
    """Return a command by its name. Raises `SettingsError` for an unknown name."""
    if name not in COMMANDS:
        hint = nearest(name, set(COMMANDS), otherwise="See mtlsign --help.")
        raise SettingsError(f"The command {name[:60]!r} is unknown. {hint}")
    module = importlib.import_module(f"mtlsign.commands.{COMMANDS[name][0]}")
    selected: cli.Job[Any] = getattr(module, name.replace("-", "_"))
    return selected


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run `mtlsign COMMAND …` and exit with the code of its outcome."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(usage(), file=sys.stderr)
        sys.exit(2)
    if arguments[0] in ("--version", "-V"):
        print(f"mtlsign {__version__}")
        sys.exit(0)
    if arguments[0] in ("--help", "-h", "help"):
        print(usage())
        sys.exit(0)
    try:
        selected = command(arguments[0])
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    selected.run(arguments[1:])
