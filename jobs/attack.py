"""Attack a marked model: `python jobs/attack.py --model MODEL --kit KIT --attacks fast`."""

if __name__ == "__main__":
    import _checkout  # noqa: F401

from mtlsign.commands.attack import attack as main

if __name__ == "__main__":
    main.run()
