"""Last step of embedding: read what was written as a verifier does, in a network built from the spec."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtlsign.errors import ArtifactError, ModelError
from mtlsign.models.factories import Factory
from mtlsign.storage.base import Storage
from mtlsign.storage.model_folder import KITS, MODELS, read_model
from mtlsign.watermark.keys.opening import KeyOpening
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import OwnerKit, read_kit
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference
from mtlsign.watermark.verification.verdict import Verdict


def fresh_detector(
    opening: KeyOpening, reference: bytes, head: bytes | None, factories: Mapping[str, Factory]
) -> WatermarkDetector:
    """Return the detector of a verifier, who has only the stored bytes and code that builds the network.

    Args:
        opening: the opened key; it is serialised and read again.
        reference: bytes of W0's reference.
        head: bytes of a free head, None for the other heads.
        factories: factories of custom architectures. Each network that they build gets other values, because
            those of the owner's own network are not available to a verifier.
    """
    return WatermarkDetector(
        KeyOpening.from_json(opening.to_json()),
        Reference.from_bytes(reference),
        head=head,
        factories={path: _with_other_values(factory) for path, factory in factories.items()},
    )


def _with_other_values(factory: Factory) -> Factory:
    @functools.wraps(factory)  # with its signature, by which the builder chooses the options to pass
    def build(**options: Any) -> nn.Module:
        network = factory(**options)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in network.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        return network

    return build


def require_equal_readings(
    verdict: Verdict, tensors: Mapping[str, Tensor], detector: WatermarkDetector
) -> None:
    """Check that the written bytes show the same bits as the trained network.

    Args:
        verdict: verdict on the written bytes, by a fresh detector.
        tensors: state dict of the trained network.
        detector: detector with the owner's own network as template.

    Raises:
        ModelError: the bits differ.
    """
    trained = verify(tensors, detector)
    if (trained.matches, trained.status) != (verdict.matches, verdict.status):
        raise ModelError(
            f"The written model shows {verdict.matches:,} of {verdict.n:,} bits, and the trained network "
            f"{trained.matches:,}: the marked layers depend on values that neither the model's file nor the "
            "kit holds. Register such values as buffers of the network, or mark other layers with --taps.",
            field="model",
        )


def require_stored(
    storage: Storage,
    digest: str,
    kits: Mapping[str, OwnerKit],
    secret: EncryptionSecret,
    *,
    endpoint: str | None = None,
) -> None:
    """Read model and kits back, and check that they are those that were verified.

    Args:
        storage: the storage that holds them.
        digest: SHA-256 of the verified model file.
        kits: the verified kits by id.
        secret: the owner's encryption secret.
        endpoint: S3 endpoint.

    Raises:
        ArtifactError: a stored file differs.
    """
    stored = read_model(storage.child(MODELS).child(digest).uri, endpoint=endpoint)
    if stored.digest != digest:
        raise ArtifactError(f"{stored.location} holds another model than was written. Repeat the last step.")
    for kit_id, kit in kits.items():
        if read_kit(storage.child(KITS).child(kit_id).uri, secret, endpoint=endpoint) != kit:
            raise ArtifactError(f"Kit {kit_id} is not the one that was written. Repeat the last step.")
