"""Commands of the operator: `python -m mtlsign.service token NAME --scopes verify`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mtlsign.config import cli
from mtlsign.config.service import ServiceSettings
from mtlsign.errors import SettingsError
from mtlsign.reports import console
from mtlsign.service.auth import tokens
from mtlsign.service.database import FILE_NAME, Database
from mtlsign.service.problems import Problem

MAX_HOURS = 24 * 3650


def main(argv: Sequence[str]) -> None:
    """Run a command: `token NAME` creates a token, `tokens` lists all, `revoke ID` revokes one."""
    arguments = _parser().parse_args(list(argv))
    base = {"state_dir": arguments.state_dir} if arguments.state_dir else None
    settings = ServiceSettings.load(base=base)
    hours = settings.token_ttl_hours if arguments.hours is None else arguments.hours
    if not 0 < hours <= MAX_HOURS:
        message = f"{hours:g} is not a number of hours over 0 and at most {MAX_HOURS}. Choose another."
        raise SettingsError(message, field="hours")
    path = (arguments.state_dir or settings.state_dir) / FILE_NAME
    if not path.exists():
        print(f"{path} is new: a service with another state folder does not know it", file=sys.stderr)
    database = Database(path)
    try:
        if arguments.action == "token":
            scopes = [scope.strip() for scope in arguments.scopes.split(",") if scope.strip()]
            print(tokens.issue(database, arguments.name, scopes, hours))
        elif arguments.action == "tokens":
            console.print_json(tokens.list_tokens(database))
        elif not tokens.revoke(database, arguments.name):
            message = "No valid token has this id. Use an id that the command tokens lists."
            raise SettingsError(message, field="revoke")
    except Problem as problem:
        raise SettingsError(problem.detail, field=arguments.action) from None
    finally:
        database.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mtlsign.service", description=__doc__)
    parser.add_argument("action", choices=["token", "tokens", "revoke"])
    parser.add_argument("name", nargs="?", default="", help="token: its name; revoke: its id")
    parser.add_argument(
        "--scopes", default="verify,ledger", help="some of verify, ledger, admin, separated by commas"
    )
    parser.add_argument("--hours", type=float, help="hours until the token expires")
    parser.add_argument(
        "--state-dir", type=Path, help="state folder of the service [MTLSIGN_STATE_DIR, mtlsign-service]"
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
