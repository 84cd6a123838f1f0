"""Embed over a grid of settings: `python jobs/sweep.py --space smoke`."""

if __name__ == "__main__":
    import _checkout  # noqa: F401

from mtlsign.commands.sweep import sweep as main

if __name__ == "__main__":
    main.run()
