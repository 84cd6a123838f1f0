"""Resolve a dispute: `python jobs/dispute.py --ledger URI --claims ID --claims ID`."""

if __name__ == "__main__":
    import _checkout  # noqa: F401

from mtlsign.commands.claims import dispute as main

if __name__ == "__main__":
    main.run()
