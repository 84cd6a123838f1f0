"""Start the verification service and keep it running: `python jobs/serve.py --allow s3://BUCKET/PREFIX`.

Settings come from flags, below them `--config FILE`, below them `MTLSIGN_*`. Ctrl-C or SIGTERM stops it.
A token for a caller: `python -m mtlsign.service token NAME --scopes verify,ledger`.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from mtlsign.config import cli
from mtlsign.config.service import ServiceSettings


def main(argv: Sequence[str]) -> None:
    """Settings → a service that answers until it is stopped."""
    given = cli.parse(ServiceSettings, argv, description=__doc__ or "")
    s = ServiceSettings.merged(given)
    from mtlsign.distributed import serve

    serve.start(s)
    scheme = "https" if s.tls_cert else "http"
    print(f"{scheme}://{s.host}:{s.port}/ answers; its state lies in {s.state.absolute()}", flush=True)
    # After Ray's start, which takes SIGTERM for itself: service managers stop a process with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("stopping", file=sys.stderr, flush=True)
    finally:
        serve.stop()


if __name__ == "__main__":
    cli.run(main)
