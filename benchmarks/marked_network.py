"""A trained network with a spread mark, the subject of studies of suspects' files."""

from __future__ import annotations

import hashlib

from torch import Tensor, nn

from mtlsign.config.embed import EmbedSettings
from mtlsign.models import loading
from mtlsign.models.architectures import build
from mtlsign.tasks import Task, load_task
from mtlsign.watermark.embedding import pipeline
from mtlsign.watermark.embedding.commitment import commit_keys, measure_response_bases
from mtlsign.watermark.embedding.worker import SingleProcessContext
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.verification.detector import WatermarkDetector


class MarkedNetwork:
    """W0 from phase 1, the marked network from phase 2, and the detector of its key.

    Args:
        settings: complete settings of the embedding; the key is a test key of their seed.
        study: the name of the study, from which the owner's identity is derived.
    """

    def __init__(self, settings: EmbedSettings, study: str) -> None:
        self.settings = settings
        self.task: Task = load_task(settings.task, data=settings.data, seed=settings.seed)
        self.architecture = loading.architecture_from_settings(settings, self.task.input_spec)
        self.factories = loading.custom_factories(self.architecture)
        self.base_weights = self.train(settings.seed)
        owner = Identity(hashlib.sha256(study.encode()).digest(), bytes(32))
        network = self.build()
        bases = measure_response_bases(network, self.base_weights, self.task, settings)
        (opening,), reference = commit_keys(
            network, self.base_weights, self.architecture, self.task.input_spec, settings, owner, bases=bases
        )
        result = pipeline.run_phase2(
            settings, self.base_weights, [opening], reference, SingleProcessContext()
        )
        self.detector = WatermarkDetector(opening, reference, head=result.head, factories=self.factories)
        self.marked = self.build(result.tensors)

    def build(self, tensors: dict[str, Tensor] | None = None) -> nn.Module:
        """Build the network in evaluation mode, with the given weights or random ones."""
        network = build(self.architecture, factories=self.factories)
        if tensors is not None:
            network.load_state_dict(tensors)
        return network.eval()

    def train(self, seed: int) -> dict[str, Tensor]:
        """Return the weights of an unmarked network of a seed."""
        settings = self.settings.updated({"seed": seed})
        return pipeline.run_phase1(settings, self.architecture, SingleProcessContext())[0]
