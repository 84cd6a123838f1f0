"""Commit to a marked model: `python jobs/publish.py --kit KIT --model MODEL --ledger URI`."""

if __name__ == "__main__":
    import _checkout  # noqa: F401

from mtlsign.commands.claims import publish as main

if __name__ == "__main__":
    main.run()
