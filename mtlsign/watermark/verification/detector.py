"""Algorithm 1 of the paper: the detector of one key. A failed claim is a `Verdict`, never an exception."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtlsign.errors import ArtifactError
from mtlsign.models import architectures
from mtlsign.models.factories import Factory
from mtlsign.models.untrusted import select_tensors_untrusted
from mtlsign.watermark import carriers
from mtlsign.watermark.keys.opening import KeyOpening, keystream, watermark_integers, watermark_labels
from mtlsign.watermark.keys.spec import Spec, parse_spec
from mtlsign.watermark.verification import evidence
from mtlsign.watermark.verification.conv_model import ConvVerifierModel
from mtlsign.watermark.verification.heads import Head, KeyDerivedHead, TrainedHead
from mtlsign.watermark.verification.model import VerifierModel, exact_fp32
from mtlsign.watermark.verification.reference import Reference
from mtlsign.watermark.verification.verdict import Verdict

#: A score nearer to 0 than this counts as wrong and is reported (docs/decisions/0001).
MIN_SCORE = 1e-4


class WatermarkDetector:
    """Detector of one key: inputs, labels, verifier model and head (lines 1 and 2 of Algorithm 1).

    Args:
        opening: spec, public key and signature; every choice of the claimant is hashed into the key.
        reference: W0's reference; its digest must be the spec's.
        head: opened free head (safetensors bytes); None creates a fresh one, as embedding needs.
        device: where scores are computed.
        factories: architectures beyond the allow-list, from the operator's own settings only.

    Raises:
        KeyMaterialError, ArtifactError, ModelError: the opening, reference or head is damaged or does not
            fit.
    """

    def __init__(
        self,
        opening: KeyOpening,
        reference: Reference,
        *,
        head: bytes | None = None,
        device: torch.device | str = "cpu",
        factories: Mapping[str, Factory] | None = None,
    ) -> None:
        self.key = opening.key()
        self.spec = parse_spec(opening.spec)
        if reference.digest != self.spec.reference:
            raise ArtifactError(
                "The reference is not the one that the spec names. Use the reference of the same kit.",
                field="reference",
            )
        self.device = torch.device(device)
        self.images, self.labels = watermark_dataset(self.spec, self.key)
        self.images, self.labels = self.images.to(self.device), self.labels.to(self.device)
        template_model = architectures.build(self.spec.graph, factories=factories)
        self.model: VerifierModel = ConvVerifierModel(
            template_model, self.spec.taps, reference, self.images[:2]
        )
        self.pooled = self.spec.head.kind == "free" and self.spec.head.features == "pooled"
        self.head = self._make_head(head)

    def _make_head(self, data: bytes | None) -> Head:
        """Derive the keyed head, read an opened free head, or create a fresh free head."""
        d, hidden = self._width(), self.spec.head.hidden or 1
        if self.spec.head.kind == "keyed":
            return KeyDerivedHead(self.key, d, self.device)
        if data is None:
            seed = int.from_bytes(keystream(self.key, b"mtlsign/v0/head-init", 7))
            return TrainedHead(d, hidden, pooled=self.pooled, seed=seed, device=self.device)
        return TrainedHead.from_bytes(data, d, hidden, pooled=self.pooled, device=self.device)

    def _width(self) -> int:
        """Return the number of features, measured on zero weights."""
        zeros = {
            name: torch.zeros(shape, device=self.device) for name, shape in self.model.weight_shapes.items()
        }
        with torch.no_grad():
            return self.model.features(zeros, self.images[:2], pooled=self.pooled).inverse_std.shape[0]

    def with_control_key(self, index: int) -> WatermarkDetector:
        """Return the same detector for an unrelated key: other inputs, labels and keyed head."""
        other = copy.copy(self)
        other.key = keystream(self.key, b"mtlsign/v0/control/%d" % index, 32)
        images, labels = watermark_dataset(self.spec, other.key)
        other.images, other.labels = images.to(self.device), labels.to(self.device)
        if self.spec.head.kind == "keyed":
            other.head = KeyDerivedHead(other.key, self._width(), self.device)
        return other

    def score_kernels(self, kernels: Mapping[str, Tensor], *, differentiable: bool = False) -> Tensor:
        """Compute scores float32 [N] of kernels on the key set as one batch.

        Args:
            kernels: result of `model.select_weights`.
            differentiable: whether gradients pass through the canonical form.
        """
        with exact_fp32():
            canonical = self.model.canonicalize(kernels, differentiable_rounds=2 if differentiable else 0)
            return self.head(self.model.features(canonical, self.images, pooled=self.pooled))

    @torch.no_grad()
    def score_state_dict(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, str | None]:
        """Compute scores float32 [N] on the CPU of untrusted tensors, or return why they cannot be read."""
        selection = select_tensors_untrusted(
            dict(self.model.weight_shapes), tensors, optional=dict(self.model.optional_shapes)
        )
        if selection.problem is not None:
            return None, selection.problem
        kernels = self.model.select_weights(
            {name: tensor.to(self.device) for name, tensor in selection.tensors.items()}
        )
        scores = self.score_kernels(kernels).cpu()
        if not torch.isfinite(scores).all():
            return None, "its values overflow in float32"
        return scores, None


def watermark_dataset(spec: Spec, key: bytes) -> tuple[Tensor, Tensor]:
    """Derive D_WM (paper §3.2) from the key alone: inputs float32 [N, C, H, W] and labels uint8 [N]."""
    inputs = carriers.for_spec(spec).inputs(watermark_integers(key, spec.n))
    return inputs, torch.from_numpy(watermark_labels(key, spec.n))


def matching_bits(scores: Tensor, bits: Tensor) -> Tensor:
    """Compare N scores with N bits: bool [N]. A score within 1e-4 of 0 never matches."""
    return ((scores > 0) == (bits.to(scores.device) > 0)) & (scores.abs() >= MIN_SCORE)


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
    scores, problem = detector.score_state_dict(tensors)
    n = detector.spec.n
    if scores is None:
        return Verdict(
            "not_verifiable", False, 0, n, 0.0, 1.0, 0.0, bits, gamma, False, 1.0, 0, detector.spec.statistic,
            model_digest=model_digest, reason=problem,
        )  # fmt: skip
    correct = matching_bits(scores, detector.labels)
    k = int(correct.sum())
    evidence_bits = evidence.binomial_evidence_bits(k, n)
    if detector.spec.statistic == "weighted":
        weights = evidence.score_weights(scores.numpy())
        evidence_bits = evidence.weighted_tail_bits(weights, correct.numpy())
    status = "rejected"
    if evidence_bits >= bits:
        status = "needs_commitment" if detector.spec.head.kind == "free" else "accepted"
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
    )


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
        scores, _ = detector.score_state_dict(base_weights)
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
        scores, _ = control.score_state_dict(tensors)
        if scores is not None:
            accuracies.append(float(matching_bits(scores, control.labels).float().mean()))
    return accuracies


def signed_scores(detector: WatermarkDetector, networks: Sequence[Mapping[str, Tensor]]) -> list[list[float]]:
    """Return N scores for every network that can be read, with a positive sign where the bit matches."""
    signs = detector.labels.cpu().float() * 2 - 1
    scores = [detector.score_state_dict(network)[0] for network in networks]
    return [(s * signs).tolist() for s in scores if s is not None]
