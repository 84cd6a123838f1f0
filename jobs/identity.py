"""Create an owner identity: `python jobs/identity.py --owner FILE --passphrase-file FILE`."""

if __name__ == "__main__":
    import _checkout  # noqa: F401

from mtlsign.commands.identity import identity as main

if __name__ == "__main__":
    main.run()
