"""Command `mtlsign verify`."""

from __future__ import annotations

from mtlsign.config.claims import BundleSettings
from mtlsign.config.cli import Output, job
from mtlsign.config.verify import VerdictSettings, VerifySettings


@job(BundleSettings, name="verify")
def verify_bundle(settings: BundleSettings) -> Output:
    """Verify the bundle of a claim without any network, against a checkpoint that the verifier holds."""
    from mtlsign.claims.commands import offline

    result = offline.verify_bundle(settings)
    text = f"{settings.bundle}\n  {result['standing']}: {result['sentence']}\n  {result['caveat']}"
    return Output(result, text)


@job(VerdictSettings, name="verify")
def verify_verdict(settings: VerdictSettings) -> Output:
    """Check the signature of a verdict that a verification service returned."""
    from mtlsign.claims.commands.verdict import check_verdict

    result = check_verdict(settings)
    lines = [
        f"{settings.verdict}",
        f"  status    {result['status']}: {result['matches']} of {result['n']} bits, "
        f"{result['evidence_bits']:.1f} bits of evidence, {result['bits_required']:g} required",
        f"  model     {result['suspect']}",
        f"  key       {result['key']}",
        f"  signed    {result['signed']} by {result['signer']}",
        f"  {result['caveat']}",
    ]
    return Output(result, "\n".join(lines))


@job(VerifySettings, variants={"bundle": verify_bundle, "verdict": verify_verdict})
def verify(settings: VerifySettings) -> Output:
    """Verify models against an owner kit.

    With --bundle FILE: verify the bundle of a claim.
    With --verdict FILE: check the signed verdict of a service.

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
