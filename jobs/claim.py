"""Open a key against a suspect: `python jobs/claim.py --kit KIT --model MODEL --ledger URI`."""

if __name__ == "__main__":
    import _checkout  # noqa: F401

from mtlsign.commands.claims import claim as main

if __name__ == "__main__":
    main.run()
