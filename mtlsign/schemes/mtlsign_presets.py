"""The presets `keyed` and `paper` as further schemes, for tables that compare schemes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mtlsign.models.architectures import HeadKind
from mtlsign.schemes.base import Detection, Forgery
from mtlsign.schemes.forging import computed_key
from mtlsign.schemes.mtlsign import MTLSignKey, MTLSignScheme, Preset
from mtlsign.tasks import Task
from mtlsign.watermark.embedding.losses import watermark_loss


@dataclass(frozen=True)
class KeyedScheme(MTLSignScheme):
    """The preset `keyed`: a head of the key on features of the first stage (docs/decisions/0002)."""

    name: ClassVar[str] = "mtlsign_keyed"
    default_steps: ClassVar[int] = 800
    preset: ClassVar[Preset] = "keyed"

    head: HeadKind = "keyed"


@dataclass(frozen=True)
class PaperScheme(MTLSignScheme):
    """The preset `paper`: the scheme as published (section 3), with a trained head and N = 600.

    A head can be trained to fit a given model. A verdict is therefore `needs_commitment`. As for other
    schemes that need a commitment, `verify` accepts the key as one that was fixed beforehand.

    Attributes:
        forging_steps: steps of Adam with which a false claimant trains a head.
    """

    name: ClassVar[str] = "mtlsign_paper"
    needs_commitment: ClassVar[bool] = True
    default_steps: ClassVar[int] = 800
    preset: ClassVar[Preset] = "paper"

    head: HeadKind = "free"
    forging_steps: int = 200

    def verify(
        self, model: nn.Module, key: MTLSignKey, tensors: Mapping[str, Tensor] | None = None
    ) -> Detection:
        """Run Algorithm 1; enough evidence is accepted."""
        detection = super().verify(model, key, tensors)
        return replace(detection, accepted=detection.status in ("accepted", "needs_commitment"))

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery:
        """Train a head for a new key on the features of the unchanged model."""

        def detect() -> Detection:
            key = self.generate_key(model, task, seed)
            head, labels = key.detector.feature_readout.head, key.labels.float()
            features = key.features(model)
            optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
            for _ in range(self.forging_steps):
                optimizer.zero_grad()
                watermark_loss(head(features), labels).backward()
                optimizer.step()
            return self.verify(model, key)

        return computed_key("head trained on the suspect", detect)
