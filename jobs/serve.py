"""Start the verification service: `python jobs/serve.py --allowed-locations s3://BUCKET/PREFIX`."""

if __name__ == "__main__":
    import _checkout  # noqa: F401

from mtlsign.commands.service import serve as main

if __name__ == "__main__":
    main.run()
