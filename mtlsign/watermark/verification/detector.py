"""Algorithm 1: does this network carry this key? A failed claim is a `Verdict`, never an exception."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtlsign.errors import ArtifactError
from mtlsign.models import architectures
from mtlsign.models.checkpoints import select_tensors_untrusted
from mtlsign.models.factories import Factory
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.keys.opening import KeyOpening, keystream, watermark_integers, watermark_labels
from mtlsign.watermark.keys.spec import Spec, parse_spec
from mtlsign.watermark.verification import evidence as null
from mtlsign.watermark.verification.graph import VerifierModel, exact_fp32
from mtlsign.watermark.verification.heads import Head, KeyDerivedHead, TrainedHead
from mtlsign.watermark.verification.reference import Reference

#: A score nearer to 0 than this counts as wrong and is reported (design decision 1).
MIN_SCORE = 1e-4


@dataclass(frozen=True)
class Verdict:
    """What verification found (design decision 3). `evidence_bits` is authoritative; `p_value` may underflow
    to 0.

    `status`: accepted, rejected, needs_commitment (a free head passes on any model, so only an earlier
    commitment makes it evidence), or not_verifiable (the network could not be mapped; never read it as "not
    marked").
    """

    status: str
    accepted: bool
    matches: int
    n: int
    accuracy: float
    p_value: float
    evidence_bits: float
    bits_required: float
    gamma: float
    passes_gamma: bool
    chernoff_bound: float
    near_zero: int
    statistic: str
    controls: dict[str, list[float]] = field(default_factory=dict)
    model_digest: str | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)

    def summary(self) -> str:
        """The verdict in one sentence for a person."""
        if self.status == "not_verifiable":
            return f"Not verifiable: {self.reason}. This does not say that the model is unmarked."
        found = (
            f"{self.matches:,} of {self.n:,} bits agree; "
            f"by chance this happens once in 2^{self.evidence_bits:.1f} keys"
        )
        if self.status == "needs_commitment":
            return (
                f"{found}, but a trained head fits any model: "
                "only a commitment older than the model makes it evidence."
            )
        if self.accepted:
            return (
                f"Accepted: {found}. These weights descend from a model that the holder of this key changed."
            )
        return f"Rejected: {found}, less than the 2^{self.bits_required:g} required."


class WatermarkDetector:
    """The assembled test of one key: images, labels, graph, head (lines 1 and 2 of Algorithm 1).

    Args:
        opening: spec, public key, signature; everything the claimant chose is hashed into the key.
        reference: W0's frame; its digest must be the spec's.
        head: an opened free head (safetensors bytes); None makes a fresh one, as embedding needs.
        factories: architectures beyond the allow-list, from this operator's settings only.

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
                "is not the one that the spec names; take the kit as it was written", field="reference"
            )
        self.device = torch.device(device)
        self.images, self.labels = watermark_dataset(self.spec, self.key)
        self.images, self.labels = self.images.to(self.device), self.labels.to(self.device)
        skeleton = architectures.build(self.spec.graph, factories=factories)
        self.graph = VerifierModel(skeleton, self.spec.taps, reference, self.images[:2])
        kind = self.spec.head
        self.pooled = kind.kind == "free" and kind.features == "pooled"
        d, hidden = self._width(), kind.hidden or 1
        self.head: Head
        if kind.kind == "keyed":
            self.head = KeyDerivedHead(self.key, d, self.device)
        elif head is None:
            seed = int.from_bytes(keystream(self.key, b"mtlsign/v0/head-init", 7))
            self.head = TrainedHead(d, hidden, pooled=self.pooled, seed=seed, device=self.device)
        else:
            self.head = TrainedHead.from_bytes(head, d, hidden, pooled=self.pooled, device=self.device)

    def _width(self) -> int:
        zeros = {name: torch.zeros(shape, device=self.device) for name, shape in self.graph.kernels.items()}
        with torch.no_grad():
            return self.graph.features(zeros, self.images[:2], pooled=self.pooled).inverse_std.shape[0]

    def with_control_key(self, index: int) -> WatermarkDetector:
        """The same test with an unrelated key: other images, labels and (keyed) read-out."""
        other = copy.copy(self)
        other.key = keystream(self.key, b"mtlsign/v0/control/%d" % index, 32)
        images, bits = watermark_dataset(self.spec, other.key)
        other.images, other.labels = images.to(self.device), bits.to(self.device)
        if self.spec.head.kind == "keyed":
            other.head = KeyDerivedHead(other.key, self._width(), self.device)
        return other

    def score_kernels(self, kernels: Mapping[str, Tensor], *, differentiable: bool = False) -> Tensor:
        """Scores float32 [N] of kernels (as `graph.read` gives them) on the whole key set as one batch."""
        with exact_fp32():
            framed = self.graph.into_frame(kernels, differentiable_rounds=2 if differentiable else 0)
            return self.head(self.graph.features(framed, self.images, pooled=self.pooled))

    @torch.no_grad()
    def score_state_dict(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, str | None]:
        """Scores float32 [N] on the CPU for anybody's tensors, or the reason why they cannot be read."""
        wanted = dict(self.graph.kernels)
        mapped = select_tensors_untrusted(
            wanted, tensors, optional={self.graph.gammas[w]: (wanted[w][0],) for w in self.graph.gammas}
        )
        if mapped.problem is not None:
            return None, mapped.problem
        kernels = self.graph.read({name: t.to(self.device) for name, t in mapped.tensors.items()})
        scores = self.score_kernels(kernels).cpu()
        if not torch.isfinite(scores).all():
            return None, "its values overflow in float32"
        return scores, None


def watermark_dataset(spec: Spec, key: bytes) -> tuple[Tensor, Tensor]:
    """D_WM of the paper (§3.2): images float32 [N, C, H, W] and labels uint8 [N], both from the key alone."""
    images = qr.images(watermark_integers(key, spec.n), spec.carrier)
    return images, torch.from_numpy(watermark_labels(key, spec.n))


def matching_bits(scores: Tensor, bits: Tensor) -> Tensor:
    """Which of the N scores give their bit: bool [N]; a score within 1e-4 of 0 is wrong."""
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
        tensors: the suspect's state dict, any floating dtype, prefixes and other libraries' names allowed.
        probe: the key's test.
        bits: evidence from which the claim is accepted; the verifier's policy (decision 3).
        gamma: the paper's threshold, shown beside the exact tail.
        controls: how many unrelated keys to try on the same suspect.
        w0: the unmarked network's tapped kernels, if the owner shows them, as a further control.
        model_digest: copied into the verdict.
    """
    scores, problem = detector.score_state_dict(tensors)
    n = detector.spec.n
    if scores is None:
        return Verdict(
            "not_verifiable", False, 0, n, 0.0, 1.0, 0.0, bits, gamma, False, 1.0, 0, detector.spec.statistic,
            model_digest=model_digest, reason=problem,
        )  # fmt: skip
    right = matching_bits(scores, detector.labels)
    k = int(right.sum())
    evidence = null.binomial_evidence_bits(k, n)
    if detector.spec.statistic == "weighted":
        evidence = null.weighted_tail_bits(null.score_weights(scores.numpy()), right.numpy())
    tried: dict[str, list[float]] = {}
    if controls:
        tried["wrong_keys"] = control_accuracies(tensors, detector, controls)
    if base_weights is not None:
        unmarked, _ = detector.score_state_dict(base_weights)
        if unmarked is not None:
            tried["w0"] = [float(matching_bits(unmarked, detector.labels).float().mean())]
    passed = evidence >= bits
    status = (
        "rejected" if not passed else "needs_commitment" if detector.spec.head.kind == "free" else "accepted"
    )
    return Verdict(
        status=status,
        accepted=status == "accepted",
        matches=k,
        n=n,
        accuracy=k / n,
        p_value=null.p_value(evidence),
        evidence_bits=evidence,
        bits_required=bits,
        gamma=gamma,
        passes_gamma=k >= gamma * n,
        chernoff_bound=null.chernoff_bound(k, n),
        near_zero=int((scores.abs() < MIN_SCORE).sum()),
        statistic=detector.spec.statistic,
        controls=tried,
        model_digest=model_digest,
    )


def control_accuracies(tensors: Mapping[str, Tensor], detector: WatermarkDetector, count: int) -> list[float]:
    """Accuracies of `count` unrelated keys on the same suspect."""
    out = []
    for i in range(count):
        other = detector.with_control_key(i)
        scores, _ = other.score_state_dict(tensors)
        if scores is not None:
            out.append(float(matching_bits(scores, other.labels).float().mean()))
    return out


def signed_scores(detector: WatermarkDetector, networks: Sequence[Mapping[str, Tensor]]) -> list[list[float]]:
    """Scores signed so that positive agrees with the bit, a list of N per network that can be read."""
    sign = detector.labels.cpu().float() * 2 - 1
    return [(s * sign).tolist() for s, _ in map(detector.score_state_dict, networks) if s is not None]
