"""Act as a council member: `python jobs/council.py --identity FILE --ledger URI`."""

if __name__ == "__main__":
    import _checkout  # noqa: F401

from mtlsign.commands.claims import council as main

if __name__ == "__main__":
    main.run()
