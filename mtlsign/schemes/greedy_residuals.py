"""Liu, Weng and Zhu 2021, "Watermarking Deep Neural Networks with Greedy Residuals" (ICML).

Signs of the means of rows of pooled weights, over the larger half of each row, are a hash of a signature. The
paper signs with RSA of 512 bits, which is factored today; here the signature is Ed25519.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from torch import Tensor, nn
from torch.nn import functional as F

from mtlsign.errors import ModelError
from mtlsign.schemes.base import Forgery
from mtlsign.schemes.forging import best_of_keys
from mtlsign.schemes.weight_marks import WeightKey, WeightMark, weight_layers, weight_of
from mtlsign.tasks import Task

#: Values of a row after pooling, at most.
MAX_ROW = 253
#: Values of a row that a layer needs at least.
_MIN_ROW = 4


@dataclass(frozen=True)
class SignedWeightKey(WeightKey):
    """Key whose bits are the hash of a signature.

    Attributes:
        public_key: Ed25519 public key, 32 bytes.
        statement: the signed text.
        signature: 64 bytes.
    """

    public_key: bytes = b""
    statement: bytes = b""
    signature: bytes = field(default=b"", repr=False)

    @property
    def is_signed(self) -> bool:
        """True if the signature is valid and the bits are its hash."""
        try:
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(self.signature, self.statement)
        except (InvalidSignature, ValueError):
            return False
        return bool(torch.equal(self.bits, signature_bits(self.signature, len(self.bits))))


@dataclass(frozen=True)
class GreedyResidualsScheme(WeightMark[SignedWeightKey]):
    """Scheme of Liu et al.

    Attributes:
        threshold: size that a row's mean must reach, tau of the paper.
        strength: weight of the sum over rows, lambda of the paper; its value 0.01 needs tens of epochs.
        kept_share: share of a row, its largest magnitudes, that counts.
    """

    name: ClassVar[str] = "greedy_residuals"
    needs_commitment: ClassVar[bool] = False

    threshold: float = 0.1
    strength: float = 0.1
    kept_share: float = 0.5

    def generate_key(self, model: nn.Module, task: Task, seed: int) -> SignedWeightKey:
        """Sign a statement; the key is for the first layer with eight weights for each bit."""
        layers = weight_layers(model)
        needed = 2 * _MIN_ROW * self.key_size
        layer = next((name for name, weight in layers.items() if weight.numel() >= needed), None)
        if layer is None:
            raise ModelError(
                f"The scheme needs a layer of {needed:,} weights. Choose a smaller key size or a wider "
                "network.",
                field="model",
            )
        private_key = Ed25519PrivateKey.from_private_bytes(
            hashlib.sha256(f"mtlsign/greedy_residuals {seed}".encode()).digest()
        )
        statement = f"owner {seed}".encode()
        signature = private_key.sign(statement)
        bits = signature_bits(signature, self.key_size)
        public_key = private_key.public_key().public_bytes_raw()
        return SignedWeightKey(
            layer, tuple(layers[layer].shape), torch.empty(0, self.key_size), bits,
            public_key, statement, signature,
        )  # fmt: skip

    def scores(self, model: nn.Module, key: SignedWeightKey) -> Tensor:
        """Return the means of the larger half of each row, [n]. Raises `ModelError` without a signature."""
        if not key.is_signed:
            raise ModelError("The key's bits are not the hash of a valid signature. Sign them.", field="key")
        values = weight_of(model, key.layer, key.shape).flatten()
        columns = max(_MIN_ROW, min(MAX_ROW, len(values) // len(key.bits)))
        pooled = F.adaptive_avg_pool1d(values[None, None], len(key.bits) * columns)
        rows = pooled.reshape(len(key.bits), columns)
        kept_count = max(1, round(self.kept_share * columns))
        limits = rows.detach().abs().topk(kept_count, dim=1).values[:, -1:]
        return torch.where(rows.abs() >= limits, rows, 0.0).mean(1)

    def bit_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the shortfalls of signed means from the threshold."""
        signs = labels.to(scores) * 2 - 1
        return F.relu(self.threshold - signs * scores).sum()

    def term(self, model: nn.Module, key: SignedWeightKey, step: int) -> Tensor:
        """Return lambda times the sum."""
        return self.strength * super().term(model, key, step)

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery:
        """Try identities, because the bits are a hash of a signature."""
        return best_of_keys(
            lambda index: self.verify(model, self.generate_key(model, task, seed * 1_000_003 + index)),
            tries=self.forging_tries,
        )


def signature_bits(signature: bytes, count: int) -> Tensor:
    """Return bits of SHAKE-256 over a signature; its first 256 replace SHA-256: float32 [count]."""
    digest = hashlib.shake_256(signature).digest((count + 7) // 8)
    return torch.tensor(
        [digest[index // 8] >> (index % 8) & 1 for index in range(count)], dtype=torch.float32
    )
