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
from mtlsign.models.checkpoints import map_suspect
from mtlsign.models.factories import Factory
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.keys.opening import KeyOpening, integers, keystream, labels
from mtlsign.watermark.keys.spec import Spec, parse_spec
from mtlsign.watermark.verification import evidence as null
from mtlsign.watermark.verification.graph import VerifierGraph, exact_fp32
from mtlsign.watermark.verification.heads import FreeHead, Head, KeyedHead
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

    def sentence(self) -> str:
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


class Probe:
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
        self.images, self.labels = key_set(self.spec, self.key)
        self.images, self.labels = self.images.to(self.device), self.labels.to(self.device)
        skeleton = architectures.build(self.spec.graph, factories=factories)
        self.graph = VerifierGraph(skeleton, self.spec.taps, reference, self.images[:2])
        kind = self.spec.head
        self.pooled = kind.kind == "free" and kind.features == "pooled"
        d, hidden = self._width(), kind.hidden or 1
        self.head: Head
        if kind.kind == "keyed":
            self.head = KeyedHead(self.key, d, self.device)
        elif head is None:
            seed = int.from_bytes(keystream(self.key, b"mtlsign/v0/head-init", 7))
            self.head = FreeHead(d, hidden, pooled=self.pooled, seed=seed, device=self.device)
        else:
            self.head = FreeHead.from_bytes(head, d, hidden, pooled=self.pooled, device=self.device)

    def _width(self) -> int:
        zeros = {name: torch.zeros(shape, device=self.device) for name, shape in self.graph.kernels.items()}
        with torch.no_grad():
            return self.graph.features(zeros, self.images[:2], pooled=self.pooled).inverse_std.shape[0]

    def control(self, index: int) -> Probe:
        """The same test with an unrelated key: other images, labels and (keyed) read-out."""
        other = copy.copy(self)
        other.key = keystream(self.key, b"mtlsign/v0/control/%d" % index, 32)
        images, bits = key_set(self.spec, other.key)
        other.images, other.labels = images.to(self.device), bits.to(self.device)
        if self.spec.head.kind == "keyed":
            other.head = KeyedHead(other.key, self._width(), self.device)
        return other

    def scores_of(self, kernels: Mapping[str, Tensor], *, differentiable: bool = False) -> Tensor:
        """Scores float32 [N] of kernels (as `graph.read` gives them) on the whole key set as one batch."""
        with exact_fp32():
            framed = self.graph.into_frame(kernels, differentiable_rounds=2 if differentiable else 0)
            return self.head(self.graph.features(framed, self.images, pooled=self.pooled))

    @torch.no_grad()
    def scores(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, str | None]:
        """Scores float32 [N] on the CPU for anybody's tensors, or the reason why they cannot be read."""
        wanted = dict(self.graph.kernels)
        mapped = map_suspect(
            wanted, tensors, optional={self.graph.gammas[w]: (wanted[w][0],) for w in self.graph.gammas}
        )
        if mapped.problem is not None:
            return None, mapped.problem
        kernels = self.graph.read({name: t.to(self.device) for name, t in mapped.tensors.items()})
        scores = self.scores_of(kernels).cpu()
        if not torch.isfinite(scores).all():
            return None, "its values overflow in float32"
        return scores, None


def key_set(spec: Spec, key: bytes) -> tuple[Tensor, Tensor]:
    """D_WM of the paper (§3.2): images float32 [N, C, H, W] and labels uint8 [N], both from the key alone."""
    images = qr.images(integers(key, spec.n), spec.carrier)
    return images, torch.from_numpy(labels(key, spec.n))


def agreement(scores: Tensor, bits: Tensor) -> Tensor:
    """Which of the N scores give their bit: bool [N]; a score within 1e-4 of 0 is wrong."""
    return ((scores > 0) == (bits.to(scores.device) > 0)) & (scores.abs() >= MIN_SCORE)


def verify(
    tensors: Mapping[str, Tensor],
    probe: Probe,
    *,
    bits: float = 120.0,
    gamma: float = 0.7,
    controls: int = 0,
    w0: Mapping[str, Tensor] | None = None,
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
    scores, problem = probe.scores(tensors)
    n = probe.spec.n
    if scores is None:
        return Verdict(
            "not_verifiable", False, 0, n, 0.0, 1.0, 0.0, bits, gamma, False, 1.0, 0, probe.spec.statistic,
            model_digest=model_digest, reason=problem,
        )  # fmt: skip
    right = agreement(scores, probe.labels)
    k = int(right.sum())
    evidence = null.tail_bits(k, n)
    if probe.spec.statistic == "weighted":
        evidence = null.weighted_tail_bits(null.score_weights(scores.numpy()), right.numpy())
    tried: dict[str, list[float]] = {}
    if controls:
        tried["wrong_keys"] = wrong_keys(tensors, probe, controls)
    if w0 is not None:
        unmarked, _ = probe.scores(w0)
        if unmarked is not None:
            tried["w0"] = [float(agreement(unmarked, probe.labels).float().mean())]
    passed = evidence >= bits
    status = (
        "rejected" if not passed else "needs_commitment" if probe.spec.head.kind == "free" else "accepted"
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
        statistic=probe.spec.statistic,
        controls=tried,
        model_digest=model_digest,
    )


def wrong_keys(tensors: Mapping[str, Tensor], probe: Probe, count: int) -> list[float]:
    """Accuracies of `count` unrelated keys on the same suspect."""
    out = []
    for i in range(count):
        other = probe.control(i)
        scores, _ = other.scores(tensors)
        if scores is not None:
            out.append(float(agreement(scores, other.labels).float().mean()))
    return out


def scores_of_all(probe: Probe, networks: Sequence[Mapping[str, Tensor]]) -> list[list[float]]:
    """Scores signed so that positive agrees with the bit, a list of N per network that can be read."""
    sign = probe.labels.cpu().float() * 2 - 1
    return [(s * sign).tolist() for s, _ in map(probe.scores, networks) if s is not None]
