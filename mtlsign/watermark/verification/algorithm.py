"""Algorithm 1 of the paper. A failed claim is a `Verdict`, never an exception."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from mtlsign.watermark.verification import evidence
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.scores import MIN_SCORE, ScoreResult, matching_bits
from mtlsign.watermark.verification.verdict import Verdict


def verify(
    tensors: Mapping[str, Tensor],
    detector: WatermarkDetector,
    *,
    bits: float = 120.0,
    gamma: float = 0.7,
    controls: int = 0,
    base_weights: Mapping[str, Tensor] | None = None,
    model_digest: str | None = None,
) -> Verdict:
    """Run Algorithm 1 on a network's tensors.

    Args:
        tensors: the suspect's state dict, any floating dtype; prefixes and other libraries' names may occur.
        detector: detector of the claimed key.
        bits: evidence from which the claim is accepted; the verifier's policy (docs/decisions/0006).
        gamma: the paper's threshold, reported next to the exact tail.
        controls: number of unrelated keys to test on the same suspect.
        base_weights: tapped kernels of W0, if the owner provides them, as a further control.
        model_digest: copied into the verdict.

    Returns:
        The verdict; it is never an exception.
    """
    results = detector.score_all(tensors)
    readable = [result for result in results if result.scores is not None]
    result = max(readable, key=lambda r: _evidence_bits(r, detector)) if readable else results[0]
    scores, n = result.scores, len(detector.labels)
    if scores is None:
        return Verdict(
            "not_verifiable", False, 0, n, 0.0, 1.0, 0.0, bits, gamma, False, 1.0, 0, detector.spec.statistic,
            model_digest=model_digest, reason=result.problem, readings=len(results),
        )  # fmt: skip
    correct = matching_bits(scores, detector.labels)
    k = int(correct.sum())
    # The best of several results has by chance at most so many times the p-value of one.
    evidence_bits = max(0.0, _evidence_bits(result, detector) - math.log2(len(results)))
    status, reason = _status(evidence_bits >= bits, detector, results)
    return Verdict(
        status=status,
        accepted=status == "accepted",
        matches=k,
        n=n,
        accuracy=k / n,
        p_value=evidence.p_value(evidence_bits),
        evidence_bits=evidence_bits,
        bits_required=bits,
        gamma=gamma,
        passes_gamma=k >= gamma * n,
        chernoff_bound=evidence.chernoff_bound(k, n),
        near_zero=int((scores.abs() < MIN_SCORE).sum()),
        statistic=detector.spec.statistic,
        controls=_control_results(tensors, detector, controls, base_weights),
        model_digest=model_digest,
        reason=reason,
        missing_layers=result.missing,
        readings=len(results),
    )


def _evidence_bits(result: ScoreResult, detector: WatermarkDetector) -> float:
    """Return -log2 of the exact chance of scores like these, for one reading."""
    assert result.scores is not None
    correct = matching_bits(result.scores, detector.labels)
    if detector.spec.statistic == "weighted":
        weights = evidence.score_weights(result.scores.numpy())
        return evidence.weighted_tail_bits(weights, correct.numpy())
    return evidence.binomial_evidence_bits(int(correct.sum()), len(detector.labels))


def _status(
    enough_evidence: bool, detector: WatermarkDetector, results: Sequence[ScoreResult]
) -> tuple[str, str | None]:
    """Return the status and its reason.

    A model is rejected only if the file has every layer in each place where it has some, and all can be read.
    """
    if enough_evidence:
        return ("needs_commitment" if detector.spec.has_trained_head else "accepted"), None
    missing = max((result.missing for result in results), key=len)
    if missing:
        return "not_verifiable", (
            f"{len(missing)} of {len(detector.weight_shapes)} layers are missing or damaged, "
            f"such as {', '.join(missing[:3])}"
        )
    problem = next((result.problem for result in results if result.problem is not None), None)
    if problem is not None:
        return "not_verifiable", f"the file has the weights {len(results)} times, and one of them {problem}"
    return "rejected", None


def _control_results(
    tensors: Mapping[str, Tensor],
    detector: WatermarkDetector,
    count: int,
    base_weights: Mapping[str, Tensor] | None,
) -> dict[str, list[float]]:
    """Compute the accuracies of unrelated keys on the suspect and of the claimed key on W0."""
    results: dict[str, list[float]] = {}
    if count:
        results["wrong_keys"] = control_accuracies(tensors, detector, count)
    if base_weights is not None:
        scores = detector.score_state_dict(base_weights).scores
        if scores is not None:
            results["w0"] = [float(matching_bits(scores, detector.labels).float().mean())]
    return results


def control_accuracies(tensors: Mapping[str, Tensor], detector: WatermarkDetector, count: int) -> list[float]:
    """Compute the accuracies of unrelated keys on the same suspect.

    Args:
        tensors: the suspect's state dict.
        detector: detector of the claimed key.
        count: number of unrelated keys.
    """
    accuracies = []
    for index in range(count):
        control = detector.with_control_key(index)
        scores = control.score_state_dict(tensors).scores
        if scores is not None:
            accuracies.append(float(matching_bits(scores, control.labels).float().mean()))
    return accuracies


def signed_scores(detector: WatermarkDetector, networks: Sequence[Mapping[str, Tensor]]) -> list[list[float]]:
    """Return N scores for every network that can be read, with a positive sign where the bit matches."""
    signs = detector.labels.cpu().float() * 2 - 1
    scores = [detector.score_state_dict(network).scores for network in networks]
    return [(s * signs).tolist() for s in scores if s is not None]
