"""The operator's commands: `python -m mtlsign.service token NAME --scopes verify`."""

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
from mtlsign.service.database import Database
from mtlsign.service.problems import Problem

MAX_HOURS = 24 * 3650


def main(argv: Sequence[str]) -> None:
    """`token NAME` makes one and prints it, `tokens` lists them, `revoke ID` ends one."""
    parser = argparse.ArgumentParser(prog="python -m mtlsign.service", description=__doc__)
    parser.add_argument("action", choices=["token", "tokens", "revoke"])
    parser.add_argument("name", nargs="?", default="", help="token: its name; revoke: its id")
    parser.add_argument(
        "--scopes", default="verify,ledger", help="some of verify, ledger, admin, with commas"
    )
    parser.add_argument("--hours", type=float, help="life of the token")
    parser.add_argument(
        "--state", type=Path, help="the service's state folder [MTLSIGN_STATE, mtlsign-service]"
    )
    given = parser.parse_args(list(argv))
    s = ServiceSettings.load(base={"state": given.state} if given.state else None)
    hours = s.token_hours if given.hours is None else given.hours
    if not 0 < hours <= MAX_HOURS:
        raise SettingsError(f"must be over 0 and at most {MAX_HOURS} (got {hours:g})", field="hours")
    file = (given.state or s.state) / "service.sqlite"
    if not file.exists():
        print(f"{file} is new: a service with another state folder does not know it", file=sys.stderr)
    store = Database(file)
    try:
        if given.action == "token":
            scopes = [scope.strip() for scope in given.scopes.split(",") if scope.strip()]
            print(tokens.issue(store, given.name, scopes, hours))
        elif given.action == "tokens":
            console.print_json(tokens.known(store))
        elif not tokens.revoke(store, given.name):
            raise SettingsError("there is no such token, or it is revoked already", field="revoke")
    except Problem as problem:
        raise SettingsError(problem.detail, field=given.action) from None
    finally:
        store.close()


if __name__ == "__main__":
    cli.run(main)
