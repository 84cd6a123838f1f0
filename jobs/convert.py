"""Convert weights to safetensors: `python jobs/convert.py --source SOURCE --output OUTPUT`."""

if __name__ == "__main__":
    import _checkout  # noqa: F401

from mtlsign.commands.convert import convert as main

if __name__ == "__main__":
    main.run()
