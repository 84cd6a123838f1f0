"""Warnings about an embedding: what its result does not show, and the setting that would change it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mtlsign.config.embed import EmbedSettings
from mtlsign.config.mixins import POLICY_BITS
from mtlsign.models.public_weights import public_package, public_weights_warning, torchvision_file
from mtlsign.watermark.verification import evidence
from mtlsign.watermark.verification.verdict import Verdict

#: Share of matching bits above which a required threshold leaves too few bits to lose.
_TIGHT_SHARE = 0.9
#: Standard errors by which an accuracy must exceed chance.
_CHANCE_ERRORS = 3.0
#: Evidence in bits from which an unmarked model's matches are not chance.
_UNMARKED_BITS = 40.0
#: Share of matching bits of the last training steps above which training has fitted the key.
_FITTED_SHARE = 0.99


def key_size_warning(bits: int, required: float = POLICY_BITS) -> str | None:
    """Return a warning if nearly all bits of a key must match for the required evidence.

    Args:
        bits: N, over all read-outs.
        required: evidence in bits.
    """
    needed = evidence.threshold(bits, required)
    if needed <= _TIGHT_SHARE * bits:
        return None
    condition = f"only if {needed:,} of them match" if needed <= bits else "in no case"
    return (
        f"A key of {bits:,} bits reaches the {required:g} bits of evidence that a verifier requires "
        f"{condition}. Raise --key-size."
    )


def chance_warning(accuracy: float, classes: int | None, samples: int) -> str | None:
    """Return a warning if a classifier is not better than chance.

    Args:
        accuracy: share of correct samples.
        classes: number of classes; None if the task is no classification.
        samples: number of samples.
    """
    if classes is None or classes < 2 or samples < 1 or not 0 <= accuracy <= 1:
        return None
    chance = 1 / classes
    if accuracy > chance + _CHANCE_ERRORS * math.sqrt(chance * (1 - chance) / samples):
        return None
    return (
        f"The clean model has {accuracy:.1%} accuracy, which is chance for {classes} classes. "
        "Check the labels and --weights, or raise --phase1.epochs or --phase1.lr."
    )


def unmarked_warning(share: float | None, bits: int) -> str | None:
    """Return a warning if the key also matches the unmarked model, which chance does not explain.

    Args:
        share: share of the key's bits that the unmarked model shows; None if it was not read.
        bits: N, over all read-outs.
    """
    matches = round((share or 0) * bits)
    if evidence.binomial_evidence_bits(matches, bits) < _UNMARKED_BITS:
        return None
    return (
        f"The unmarked model shows {matches:,} of {bits:,} bits, too: they are in the trained head and not "
        "in the weights, and every copy of that model passes. Choose --preset spread or keyed."
    )


def public_base_warning(base_weights: Mapping[str, Tensor], settings: EmbedSettings) -> str | None:
    """Return a warning if W0 is a network that everybody can download, as far as such networks are known.

    Args:
        base_weights: state dict of W0.
        settings: settings of the embedding; they may name a file of weights.
    """
    origin = public_package(base_weights)
    if settings.weights == "pretrained":
        origin = f"the pretrained network {settings.model}"
    elif settings.weights is not None and origin is None:
        origin = torchvision_file(Path(settings.weights))
    return None if origin is None else public_weights_warning(origin)


def rejection(
    verdicts: Sequence[Verdict], settings: EmbedSettings, trained_share: float | None
) -> str | None:
    """Return the problem and its remedies if the marked model does not pass its own verification.

    Args:
        verdicts: verdict of each key on the marked model.
        settings: complete settings.
        trained_share: share of matching bits in the last steps of training, None if it is not known.
    """
    failed = [
        verdict for verdict in verdicts if verdict.status in ("rejected", "unrelated", "not_verifiable")
    ]
    if not failed:
        return None
    worst = min(failed, key=lambda verdict: verdict.evidence_bits)
    if worst.status == "not_verifiable":
        return f"The watermark of the marked model cannot be read: {worst.reason}. Do not publish the model."
    remedies = []
    if key_size_warning(worst.n, worst.bits_required):
        remedies.append("raise --key-size")
    if trained_share is None or trained_share < _FITTED_SHARE:
        remedies.append(
            f"raise --phase2.steps ({settings.phase2.steps}) or --phase2.lr ({settings.phase2.lr:g})"
        )
        remedies.append(f"lower --lambda1 ({settings.lambda1:g})" if settings.lambda1 else "")
    advice = ", or ".join(remedy for remedy in remedies if remedy) or "raise --key-size"
    return (
        f"The watermark of the marked model is rejected: {worst.matches:,} of {worst.n:,} bits match, "
        f"which is {worst.evidence_bits:.1f} bits of evidence instead of {worst.bits_required:g}. "
        f"Do not publish the model. Start a new run: {advice}."
    )
