"""Command `mtlsign verify`."""

from __future__ import annotations

from mtlsign.config.claims import BundleSettings
from mtlsign.config.cli import Output, job
from mtlsign.config.verify import VerifySettings


@job(BundleSettings, name="verify")
def verify_bundle(settings: BundleSettings) -> Output:
    """Verify the bundle of a claim without any network, against a checkpoint that the verifier holds."""
    from mtlsign.claims.commands import offline

    result = offline.verify_bundle(settings)
    text = f"{settings.bundle}\n  {result['standing']}: {result['sentence']}\n  {result['caveat']}"
    return Output(result, text)


@job(VerifySettings, variants={"bundle": verify_bundle})
def verify(settings: VerifySettings) -> Output:
    """Verify models against an owner kit. With --bundle FILE: verify the bundle of a claim.

    A rejected claim is a result, not an error.
    """
    from mtlsign.watermark.kit import verify_with_kit

    verdicts = verify_with_kit(settings)
    lines = []
    for location, verdict in zip(settings.models, verdicts, strict=True):
        lines += [location, f"  {verdict.summary()}"]
        for name, accuracies in verdict.controls.items():
            lines.append(f"  control {name}: " + ", ".join(f"{a:.1%}" for a in accuracies))
    documents = [verdict.to_json() for verdict in verdicts]
    return Output(documents[0] if len(documents) == 1 else documents, "\n".join(lines))
