"""Verdict: result of one verification."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """Result of one verification (docs/decisions/0006).

    Attributes:
        status: `accepted`, `rejected`, `unrelated`, `needs_commitment` or `not_verifiable`. A free head
            passes on any model, so that only an earlier commitment makes it evidence. A network that could
            not be mapped is not verifiable; it may still be marked. A rejected model descends from the base
            model, an unrelated one shows no sign of it.
        accepted: whether the status is `accepted`.
        matches: matching bits.
        n: bits of the watermark.
        accuracy: matches / n.
        p_value: 2^-evidence_bits; it may underflow to 0.
        evidence_bits: -log2 of the chance of so many matches; authoritative.
        bits_required: evidence from which the claim is accepted.
        gamma: the paper's threshold on the accuracy.
        passes_gamma: whether the accuracy reaches gamma.
        chernoff_bound: the paper's bound on the p-value.
        near_zero: scores too near to 0 to be read.
        statistic: `count` or `weighted`, from the spec.
        controls: accuracies of unrelated keys and of W0.
        model_digest: SHA-256 of the model file, if the caller gave it.
        reason: cause of `not_verifiable`.
        missing_layers: kernels of a spread head that are missing or damaged; they contribute nothing.
        readings: how many times the file has the kernels. Each is tested. The best counts, and
            log2(readings) is subtracted from its evidence.
        similarity: mean cosine between the sketches of W0's and of the aligned suspect's rows; no evidence
            of a key.
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
    missing_layers: tuple[str, ...] = ()
    readings: int = 1
    similarity: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready fields; `missing_layers` and `readings` only if they are not () and 1."""
        fields = asdict(self)
        missing, readings = fields.pop("missing_layers"), fields.pop("readings")
        fields |= {"missing_layers": list(missing)} if missing else {}
        return fields | ({"readings": readings} if readings > 1 else {})

    def summary(self) -> str:
        """Describe the verdict in one sentence."""
        if self.status == "not_verifiable":
            return f"Not verifiable: {self.reason}. The model may still be marked."
        evidence_text = (
            f"{self.matches:,} of {self.n:,} bits agree; "
            f"a random key agrees as well with a probability of 2^-{self.evidence_bits:.1f}"
        )
        if self.status == "needs_commitment":
            return (
                f"{evidence_text}, but a trained head fits any model: "
                "only a commitment older than the model makes it evidence."
            )
        if self.accepted:
            return (
                f"Accepted: {evidence_text}. "
                "These weights descend from a model that the holder of this key changed."
            )
        required = f"{evidence_text}, and 2^-{self.bits_required:g} is required"
        if self.status == "unrelated":
            return (
                f"Unrelated: {required}. "
                "The weights are no more alike those of the owner's base model than independent ones are."
            )
        return (
            f"Rejected: {required}. The model descends from the owner's base model, but the key was not "
            "shown to be in it; this does not show that the model is unmarked."
        )
