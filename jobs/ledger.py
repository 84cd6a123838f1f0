"""Create, read and check a ledger: `python jobs/ledger.py ACTION --ledger URI`."""

if __name__ == "__main__":
    import _checkout  # noqa: F401

from mtlsign.commands.claims import ledger as main

if __name__ == "__main__":
    main.run()
