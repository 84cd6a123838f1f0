"""Repeat a study of the paper: `python jobs/reproduce.py ablation --data DATA`."""

if __name__ == "__main__":
    import _checkout  # noqa: F401

from mtlsign.commands.reproduce import reproduce as main

if __name__ == "__main__":
    main.run()
