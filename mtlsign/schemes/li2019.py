"""Li et al. 2019, "Persistent and Unforgeable Watermarks for Deep Neural Networks" (arXiv 1910.01226).

A signature determines a small pattern, its place and a class. With the pattern the network keeps its answers
(null embedding), and with the inverted pattern it answers the class (true embedding). Both are trained from
random weights, because a null embedding cannot be added to a trained network. The paper signs with RSA; here
the signature is Ed25519.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.models.input_spec import ImageSpec
from mtlsign.schemes.base import Detection, Forgery, SchemeResult, SchemeSettings
from mtlsign.schemes.forging import best_of_keys
from mtlsign.schemes.training import Optimizer, accuracies, evaluation_mode
from mtlsign.schemes.trigger_marks import TriggerKey, TriggerMark, logits_of, training_images
from mtlsign.tasks import Task
from mtlsign.tasks.splitting import seeded_generator
from mtlsign.watermark.embedding.worker import WorkerContext

#: Share of null samples that must keep their class.
NULL_ACCURACY = 0.8


@dataclass(frozen=True)
class SignedTriggerKey(TriggerKey):
    """Key samples of a signature: `inputs` are those of the true embedding.

    Attributes:
        clean: the same images without a pattern, [n, C, H, W].
        null_inputs: the same images with the null pattern.
        null_classes: their own classes, int64 [n].
        stamp: pattern of -1 and 1, float32 [side, side].
        corner: its row and column.
        public_key: Ed25519 public key, 32 bytes.
        statement: the signed text.
        signature: 64 bytes.
    """

    clean: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    null_inputs: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    null_classes: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    stamp: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    corner: tuple[int, int] = (0, 0)
    public_key: bytes = b""
    statement: bytes = b""
    signature: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Li2019Scheme(TriggerMark[SignedTriggerKey]):
    """Scheme of Li et al.

    Attributes:
        side: side of the pattern in pixels.
        size: absolute value of its pixels, lambda of the paper, outside of their range. With 2000, a value of
            published code, the statistics of batch norms follow the pattern alone, and the network answers
            one class.
    """

    name: ClassVar[str] = "li2019"
    needs_commitment: ClassVar[bool] = False
    default_steps: ClassVar[int] = 800

    side: int = 6
    size: float = 5.0

    def draw_key(self, model: nn.Module, task: Task, seed: int) -> SignedTriggerKey:
        """Sign a statement and derive class, pattern and place from four hashes of the signature."""
        private_key = Ed25519PrivateKey.from_private_bytes(
            hashlib.sha256(f"mtlsign/li2019 {seed}".encode()).digest()
        )
        statement = f"owner {seed}".encode()
        signature = private_key.sign(statement)
        target, stamp, corner = derived_pattern(signature, task, self.side)
        images, classes = training_images(task, self.key_size, seeded_generator("mtlsign/li2019", seed))
        return SignedTriggerKey(
            stamped(images, -self.size * stamp, corner), torch.full((len(images),), target),
            1 / task.classes, images, stamped(images, self.size * stamp, corner), classes, stamp,
            corner, private_key.public_key().public_bytes_raw(), statement, signature,
        )  # fmt: skip

    def optimizer(self, settings: SchemeSettings) -> Optimizer:
        """Return SGD with the learning rate of a training from random weights."""
        return Optimizer("sgd", settings.training_lr)

    def embed(
        self,
        model: nn.Module,
        task: Task,
        key: SignedTriggerKey,
        settings: SchemeSettings,
        worker: WorkerContext,
    ) -> SchemeResult:
        """Draw all weights again and train on clean, null and true samples; see `WatermarkScheme.embed`."""
        clean = accuracies(model.to(worker.device), task, worker, "clean")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded_generator("mtlsign/li2019/weights", settings.seed).initial_seed())
            for module in model.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
        result = super().embed(model, task, key, settings, worker)
        return replace(result, measured={**result.measured, **clean})

    def training_samples(self, key: SignedTriggerKey, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Return as many null samples as true samples, in turn."""
        rows = torch.arange(step * count, (step + 1) * count) % len(key.classes)
        inputs = torch.cat([key.inputs[rows], key.null_inputs[rows]])
        return inputs, torch.cat([key.classes[rows], key.null_classes[rows]])

    def scores(self, model: nn.Module, key: SignedTriggerKey) -> Tensor:
        """Return the scores of the true embedding. Raises `ModelError` for an invalid signature."""
        try:
            Ed25519PublicKey.from_public_bytes(key.public_key).verify(key.signature, key.statement)
        except (InvalidSignature, ValueError):
            raise ModelError("The key has no valid signature. Sign it.", field="key") from None
        return super().scores(model, key)

    @torch.no_grad()
    def verify(
        self,
        model: nn.Module,
        key: SignedTriggerKey,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Detection:
        """Count true samples; the claim is rejected if null samples do not keep their class."""
        detection = super().verify(model, key, tensors)
        if detection.status != "accepted":
            return detection
        with evaluation_mode(model):
            answers = logits_of(model, key.null_inputs).argmax(1).cpu()
        accuracy = float((answers == key.null_classes).float().mean())
        if accuracy >= NULL_ACCURACY:
            return detection
        reason = f"Null samples keep their class in {accuracy:.0%} of all cases."
        return Detection(
            detection.matched, detection.n, detection.evidence_bits, False, "rejected", reason,
            detection.null_rate,
        )  # fmt: skip

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery:
        """Try identities, because pattern and class are hashes of a signature."""
        return best_of_keys(
            lambda index: self.verify(model, self.draw_key(model, task, seed * 1_000_003 + index)),
            tries=self.forging_tries,
        )


def derived_pattern(signature: bytes, task: Task, side: int) -> tuple[int, Tensor, tuple[int, int]]:
    """Return class, pattern and place of a signature.

    Args:
        signature: bytes.
        task: a task of images.
        side: side of the pattern in pixels.

    Returns:
        The class, the pattern of -1 and 1 (float32 [side, side]), and its row and column.

    Raises:
        ModelError: the images are smaller than the pattern.
    """
    spec = task.input_spec
    assert isinstance(spec, ImageSpec)
    if min(spec.height, spec.width) <= side:
        raise ModelError(
            f"The images are not larger than {side} pixels. Choose a smaller side.", field="task"
        )
    hashes = [hashlib.sha256(bytes([index]) + signature).digest() for index in range(4)]
    bits = hashlib.shake_256(hashes[1]).digest(side * side)
    stamp = torch.tensor([byte % 2 for byte in bits]).float().reshape(side, side) * 2 - 1
    row, column = (
        int.from_bytes(digest, "big") % (extent - side)
        for digest, extent in ((hashes[2], spec.height), (hashes[3], spec.width))
    )
    return int.from_bytes(hashes[0], "big") % task.classes, stamp, (row, column)


def stamped(images: Tensor, stamp: Tensor, corner: tuple[int, int]) -> Tensor:
    """Return images with a stamp of pixel values in all channels at a row and column."""
    row, column = corner
    changed = images.clone()
    changed[..., row : row + len(stamp), column : column + len(stamp)] = stamp
    return changed
