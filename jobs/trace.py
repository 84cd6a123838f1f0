"""Find the recipients of a model's copies: `python jobs/trace.py --model MODEL --kits KIT --kits KIT`."""

if __name__ == "__main__":
    import _checkout  # noqa: F401

from mtlsign.commands.trace import trace as main

if __name__ == "__main__":
    main.run()
