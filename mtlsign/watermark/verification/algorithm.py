"""Algorithm 1 of the paper. A failed claim is a `Verdict`, never an exception."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from mtlsign.models.untrusted import has_unread_tensors
from mtlsign.watermark.verification import evidence
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.scores import MIN_SCORE, ScoreResult, best_result, matching_bits
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
    control_keys = [detector.with_control_key(index) for index in range(controls)]
    results, *control_results = detector.score_all_keys(tensors, control_keys)
    readable = [result for result in results if result.scores is not None]
    result = max(readable, key=lambda r: _evidence_bits(r, detector)) if readable else results[0]
    scores, n = result.scores, len(detector.labels)
    if scores is None:
        return _unreadable(results, detector, bits, gamma, model_digest)
    correct = matching_bits(scores, detector.labels)
    k = int(correct.sum())
    # The best of several results has by chance at most so many times the p-value of one.
    evidence_bits = max(0.0, _evidence_bits(result, detector) - math.log2(len(results)))
    status, reason = _status(evidence_bits >= bits, detector, results, tensors)
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
        controls=_control_results(
            detector, list(zip(control_keys, control_results, strict=True)), base_weights
        ),
        similarity=result.similarity,
        model_digest=model_digest,
        reason=reason,
        missing_layers=result.missing,
        readings=len(results),
    )


def _unreadable(
    results: Sequence[ScoreResult],
    detector: WatermarkDetector,
    bits: float,
    gamma: float,
    model_digest: str | None,
) -> Verdict:
    """Return the verdict on a suspect without any scores; see `verify` for the arguments."""
    return Verdict(
        "not_verifiable", False, 0, len(detector.labels), 0.0, 1.0, 0.0, bits, gamma, False, 1.0, 0,
        detector.spec.statistic, model_digest=model_digest, reason=results[0].problem, readings=len(results),
    )  # fmt: skip


def _evidence_bits(result: ScoreResult, detector: WatermarkDetector) -> float:
    """Return -log2 of the exact chance of scores like these, for one reading."""
    assert result.scores is not None
    correct = matching_bits(result.scores, detector.labels)
    if detector.spec.statistic == "weighted":
        weights = evidence.score_weights(result.scores.numpy())
        return evidence.weighted_tail_bits(weights, correct.numpy())
    return evidence.binomial_evidence_bits(int(correct.sum()), len(detector.labels))


def _status(
    enough_evidence: bool,
    detector: WatermarkDetector,
    results: Sequence[ScoreResult],
    tensors: Mapping[str, Tensor],
) -> tuple[str, str | None]:
    """Return the status and its reason.

    A model is rejected if it is recognised as a descendant of W0, and unrelated if it is not although the
    whole file was read. Without a sketch nothing can be recognised, and the model is rejected.
    Each of these needs that the file has every layer in each place where it has some, and that all can be
    read. Layers that are found by content show descent, and never its absence.
    """
    if enough_evidence:
        return ("needs_commitment" if detector.spec.has_trained_head else "accepted"), None
    missing = max((result.missing for result in results), key=len)
    if missing:
        return "not_verifiable", (
            f"{len(missing)} of {len(detector.kernel_shapes)} layers are missing or damaged, "
            f"such as {', '.join(missing[:3])}"
        )
    problem = next((result.problem for result in results if result.problem is not None), None)
    if problem is not None:
        return "not_verifiable", f"the file can be read in {len(results)} ways, and in one of them {problem}"
    recognizable = bool(detector.aligner.layers)
    if any(result.recognized for result in results):
        return "rejected", None
    if any(result.by_content for result in results):
        return "not_verifiable", (
            "its tensors have other names or shapes than the architecture's, and those that were taken for "
            "its layers are not alike the base model's"
        )
    if has_unread_tensors(detector.tensor_names, tensors):
        return "not_verifiable", (
            "its weights are not alike those of the base model, and some tensors of the file belong to no "
            "layer of this architecture"
        )
    return ("unrelated" if recognizable else "rejected"), None


def _control_results(
    detector: WatermarkDetector,
    results: Sequence[tuple[WatermarkDetector, Sequence[ScoreResult]]],
    base_weights: Mapping[str, Tensor] | None,
) -> dict[str, list[float]]:
    """Compute the accuracies of unrelated keys on the suspect and of the claimed key on W0."""
    accuracies: dict[str, list[float]] = {}
    if results:
        accuracies["wrong_keys"] = _accuracies(results)
    if base_weights is not None:
        accuracies["w0"] = _accuracies([(detector, detector.score_all(base_weights))])
    return {name: values for name, values in accuracies.items() if values}


def _accuracies(results: Sequence[tuple[WatermarkDetector, Sequence[ScoreResult]]]) -> list[float]:
    """Return the share of matching bits of the best result of each key."""
    accuracies = []
    for key, own in results:
        labels = key.labels.cpu()
        scores = best_result(own, labels).scores
        if scores is not None:
            accuracies.append(float(matching_bits(scores, labels).float().mean()))
    return accuracies


def control_accuracies(tensors: Mapping[str, Tensor], detector: WatermarkDetector, count: int) -> list[float]:
    """Compute the accuracies of unrelated keys on the same suspect.

    Args:
        tensors: the suspect's state dict.
        detector: detector of the claimed key.
        count: number of unrelated keys.
    """
    keys = [detector.with_control_key(index) for index in range(count)]
    if not keys:
        return []
    return _accuracies(list(zip(keys, keys[0].score_all_keys(tensors, keys[1:]), strict=True)))


def signed_scores(detector: WatermarkDetector, networks: Sequence[Mapping[str, Tensor]]) -> list[list[float]]:
    """Return N scores for every network that can be read, with a positive sign where the bit matches."""
    signs = detector.labels.cpu().float() * 2 - 1
    scores = [detector.score_state_dict(network).scores for network in networks]
    return [(s * signs).tolist() for s in scores if s is not None]
