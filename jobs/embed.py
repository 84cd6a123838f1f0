"""Embed a watermark: `python jobs/embed.py`, also by `ray job submit`."""

if __name__ == "__main__":
    import _checkout  # noqa: F401

from mtlsign.commands.embed import embed as main

if __name__ == "__main__":
    main.run()
