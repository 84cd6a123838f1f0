"""Entry point of `python -m mtlsign`."""

from mtlsign.commands import main

if __name__ == "__main__":
    main()
