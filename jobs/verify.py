"""Verify models against an owner kit: `python jobs/verify.py --model MODEL --kit KIT`."""

if __name__ == "__main__":
    import _checkout  # noqa: F401

from mtlsign.commands.verify import verify as main

if __name__ == "__main__":
    main.run()
