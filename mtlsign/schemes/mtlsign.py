"""MTLSign as a scheme: keys, embedding and verification of `mtlsign.watermark`."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mtlsign.config.embed import DEFAULT_MARGIN, EmbedSettings, learning_rates
from mtlsign.errors import ModelError
from mtlsign.models.architectures import HeadKind, default_taps
from mtlsign.models.families import custom
from mtlsign.models.loading import cpu_state
from mtlsign.schemes.base import Access, Detection, Forgery, SchemeResult, SchemeSettings
from mtlsign.schemes.forging import best_of_keys
from mtlsign.tasks import Task
from mtlsign.watermark.carriers import registry
from mtlsign.watermark.embedding.commitment import commit_keys, measure_response_bases
from mtlsign.watermark.embedding.losses import readout_loss
from mtlsign.watermark.embedding.phase2 import embed_watermark, gradient_terms
from mtlsign.watermark.embedding.worker import WorkerContext
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.features import Features
from mtlsign.watermark.verification.readouts import FeatureReadout

_FACTORY = "attacked:model"
Preset = Literal["spread", "keyed", "paper"]


@dataclass(frozen=True)
class MTLSignKey:
    """Opened key with its reference and head, assembled as a detector.

    Attributes:
        detector: its free head is trained in place by `MTLSignScheme.embed`.
        labels: bits that replace the key's own, float32 [n]; None for the key's own.
    """

    detector: WatermarkDetector = field(repr=False)
    other_labels: Tensor | None = field(default=None, repr=False)

    @property
    def labels(self) -> Tensor:
        """Bits of the watermark, [n]."""
        return self.detector.labels if self.other_labels is None else self.other_labels

    @property
    def sample_count(self) -> int:
        """Number of key images."""
        return sum(r.spec.n for r in self.detector.readouts if isinstance(r, FeatureReadout))

    @property
    def head_kind(self) -> HeadKind:
        """Kind of the first head."""
        return self.detector.readouts[0].spec.head.kind  # type: ignore[return-value]  # parsed spec

    def with_labels(self, labels: Tensor) -> MTLSignKey:
        """Return the same key with other bits for `watermark_loss`."""
        return replace(self, other_labels=labels)

    def kernels(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tapped kernels of a model, as the verifier selects them."""
        parameters = {n: p.to(self.detector.device) for n, p in model.named_parameters()}
        return self.detector.select_weights(parameters)

    @torch.no_grad()
    def features(self, model: nn.Module) -> Features:
        """Return the features of a model on the key images."""
        readout = self.detector.feature_readout
        return readout.model.features(readout.read(self.kernels(model)), readout.inputs)


@dataclass(frozen=True)
class MTLSignScheme:
    """Scheme of the paper.

    Attributes:
        head: "spread", "keyed" or "free".
        key_size: bits of the watermark; None for the default of the head.
        hidden: hidden units of a free head.
        min_evidence_bits: evidence from which a detection is accepted.
    """

    name: ClassVar[str] = "mtlsign"
    access: ClassVar[Access] = "white-box"
    needs_commitment: ClassVar[bool] = False
    default_steps: ClassVar[int] = 500
    #: Preset of `jobs/embed.py` whose defaults apply.
    preset: ClassVar[Preset] = "spread"

    head: HeadKind = "spread"
    key_size: int | None = None
    hidden: int = 64
    min_evidence_bits: float = 120.0

    def with_key_options(self, **options: Any) -> MTLSignScheme:
        """Return the scheme with other options of `generate_key`."""
        return replace(self, **options)

    def unsupported_reason(self, model: nn.Module, task: Task) -> str | None:
        """Return why the task has no carrier, or the model's default taps are unknown; None otherwise."""
        try:
            registry.kind_for(task.input_spec)
            default_taps(model, self.head, task.input_spec.sample())
        except ModelError as error:
            return error.detail
        return None

    def prepare_model(self, model: nn.Module, task: Task) -> None:
        """Replace no layer."""

    def generate_key(self, model: nn.Module, task: Task, seed: int) -> MTLSignKey:
        """Generate a key of an identity that is derived from the seed; the model serves as W0.

        Args:
            model: the model to mark; unchanged.
            task: its primary task.
            seed: seed of identity and nonce.
        """
        base = copy.deepcopy(model)
        architecture = {
            "arch": f"{custom.PREFIX}{_FACTORY}",
            **task.input_spec.architecture_fields,
        }
        identity = Identity(hashlib.sha256(f"mtlsign adversary {seed}".encode()).digest(), bytes(32))
        settings = self._embed_settings(seed=seed)
        bases = measure_response_bases(copy.deepcopy(model), cpu_state(base), task, settings)
        (opening,), reference = commit_keys(
            copy.deepcopy(model).cpu(), cpu_state(base), architecture, task.input_spec, settings, identity,
            bases=bases,
        )  # fmt: skip
        device = next(model.parameters()).device
        factories = {_FACTORY: lambda: copy.deepcopy(base).cpu()}
        return MTLSignKey(WatermarkDetector(opening, reference, device=device, factories=factories))

    def embed(
        self,
        model: nn.Module,
        task: Task,
        key: MTLSignKey,
        settings: SchemeSettings,
        worker: WorkerContext,
    ) -> SchemeResult:
        """Run phase 2 with default settings for the model's width.

        Args:
            model: changed in place.
            task: primary task with batches on the worker's device.
            key: key of `generate_key`; its free head is trained, too.
            settings: the options are settings of `EmbedSettings`, such as `lambda2`.
            worker: process in which to train.

        Raises:
            ModelError: training diverged.
        """
        return self._train(model, task, key, settings, worker, watermark_weight=1.0)

    def train_without_mark(
        self,
        model: nn.Module,
        task: Task,
        key: MTLSignKey,
        settings: SchemeSettings,
        worker: WorkerContext,
    ) -> SchemeResult:
        """Run phase 2 like `embed`, without the losses of the key's bits.

        Distillation, R_func, the frozen batch norms and the optimiser stay, so that the network is a control
        for studies of the mark's traces. The arguments are those of `embed`.
        """
        return self._train(model, task, key, settings, worker, watermark_weight=0.0)

    def _train(
        self,
        model: nn.Module,
        task: Task,
        key: MTLSignKey,
        settings: SchemeSettings,
        worker: WorkerContext,
        *,
        watermark_weight: float,
    ) -> SchemeResult:
        _, lr = learning_rates(_width(model), self.head)
        embed_settings = self._embed_settings(
            seed=settings.seed,
            **{
                "phase1.lr": settings.training_lr,
                "phase2.lr": lr,
                "phase2.steps": settings.steps,
                "phase2.batch": settings.batch,
                **settings.options,
            },
        )
        rows, measured = embed_watermark(
            model, task, key.detector, embed_settings, worker, watermark_weight=watermark_weight
        )
        key_images = key.sample_count * len(gradient_terms(0, embed_settings))
        images = settings.steps * (key_images + settings.batch)
        return SchemeResult(settings.steps, images, rows, measured)

    def verify(
        self, model: nn.Module, key: MTLSignKey, tensors: Mapping[str, Tensor] | None = None
    ) -> Detection:
        """Run Algorithm 1 on the model's state dict, or on the tensors of its file."""
        state = model.state_dict() if tensors is None else tensors
        verdict = verify(state, key.detector, bits=self.min_evidence_bits)
        return Detection(
            matched=verdict.matches,
            n=verdict.n,
            evidence_bits=verdict.evidence_bits,
            accepted=verdict.accepted,
            status=verdict.status,
            reason=verdict.reason,
        )

    def null_rate(self, key: MTLSignKey) -> float:
        """Return one half: the bits of a key are random."""
        return 0.5

    def watermark_loss(self, model: nn.Module, key: MTLSignKey) -> Tensor:
        """Return l_WM of eq. (7) in the verifier model, on the model's device."""
        scores = key.detector.score_kernels(key.kernels(model), differentiable=True)
        loss = readout_loss(key.detector.readouts, scores, key.labels, DEFAULT_MARGIN)
        return loss.to(next(model.parameters()).device)

    def forge(self, model: nn.Module, task: Task, seed: int) -> Forgery:
        """Try control keys on the model's own reference: a key is a hash, so that only tries remain."""
        detector = self.generate_key(model, task, seed).detector
        return best_of_keys(
            lambda index: self.verify(model, MTLSignKey(detector.with_control_key(index))), tries=20
        )

    def _embed_settings(self, **options: Any) -> EmbedSettings:
        key_size = {} if self.key_size is None else {"key_size": self.key_size}
        return EmbedSettings.of(
            {
                "task": "custom", "preset": self.preset, "head": self.head, "hidden": self.hidden,
                "insecure_test_key": True,
            }
            | key_size
            | options
        ).with_defaults()  # fmt: skip


def _width(model: nn.Module) -> int:
    """Return the channels of the first layer with limits, by which default learning rates are chosen."""
    return max(4, min(256, len(next(p for p in model.parameters() if p.dim() > 1))))
