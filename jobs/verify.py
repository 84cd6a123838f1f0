"""Check models against an owner kit: `python jobs/verify.py --model PLACE [--model PLACE] --kit KIT`.

Or a claim's bundle, without any network: `python jobs/verify.py --bundle FILE --head FILE`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from mtlsign.config import cli
from mtlsign.config.verify import VerifySettings
from mtlsign.reports import console


def main(argv: Sequence[str]) -> None:
    """Settings → one verdict per model. A failed claim is an answer, not an error."""
    if any(word.split("=")[0] == "--bundle" for word in argv):
        bundle(argv)
        return
    settings = cli.parse(VerifySettings, argv, description=__doc__ or "", aliases={"model": "append"})
    from mtlsign.watermark.kit import verify_with_kit

    verdicts = verify_with_kit(settings)
    if settings.json_output:
        found = [verdict.to_json() for verdict in verdicts]
        console.print_json(found[0] if len(found) == 1 else found)
        return
    for place, verdict in zip(settings.models, verdicts, strict=True):
        print(f"{place}\n  {verdict.summary()}")
        for name, accuracies in verdict.controls.items():
            print(f"  control {name}: " + ", ".join(f"{a:.1%}" for a in accuracies))


def bundle(argv: Sequence[str]) -> None:
    """Settings → the claim's verdict and standing, from one file and a head that the verifier pins."""
    from mtlsign.claims.commands.offline import verify_bundle
    from mtlsign.config.claims import BundleSettings

    settings = cli.parse(BundleSettings, argv, description=__doc__ or "")
    done = verify_bundle(settings)
    if settings.json_output:
        console.print_json(done)
        return
    print(f"{settings.bundle}\n  {done['standing']}: {done['sentence']}\n  {done['caveat']}")


if __name__ == "__main__":
    cli.run(main)
