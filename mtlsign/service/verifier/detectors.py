"""Detectors of opened claims. The cost of a claim is bounded before any of it is spent."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mtlsign.config.service import ServiceSettings
from mtlsign.errors import ArtifactError, MTLSignError
from mtlsign.models.factories import Factory
from mtlsign.service.problems import Problem, problem_from_error
from mtlsign.service.verifier.claim_bundle import OpenedClaim
from mtlsign.service.verifier.factory_parameters import check_factory_parameters
from mtlsign.service.verifier.lazy_safetensors import CachedReadings, LazySafetensors
from mtlsign.watermark.keys.spec import Spec
from mtlsign.watermark.verification.compute_budget import ComputeLimits, check_claim_budget
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference
from mtlsign.watermark.verification.selection import SuspectReading

#: Readings of one suspect that are cached: one place of its file, in its own order and aligned.
_CACHED_READINGS = 2


class _SkipInit(TorchFunctionMode):
    """Mode that builds networks without drawing initial values, which the verifier never uses."""

    _DRAWS = frozenset({torch.Tensor.normal_, torch.Tensor.uniform_, torch.nn.init.kaiming_normal_,
                        torch.nn.init.kaiming_uniform_, torch.nn.init.trunc_normal_})  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._DRAWS:
            return args[0] if args else (kwargs or {}).get("tensor")
        return func(*args, **(kwargs or {}))


def check_compute_budget(
    spec: Spec, settings: ServiceSettings, factories: Mapping[str, Factory] | None = None
) -> float:
    """Check the cost of a claim against the service's limits.

    Args:
        spec: the claim's spec.
        settings: limits `max_gflop` and `max_activation_elements`.
        factories: trusted factories by name.

    Returns:
        Operations of one claim in units of 10^9.

    Raises:
        Problem: `architecture-refused`.
    """
    check_factory_parameters(spec.architecture, settings.factory_parameters)
    limits = ComputeLimits(settings.max_gflop, settings.max_activation_elements)
    try:
        return check_claim_budget(spec, factories, limits=limits)
    except ArtifactError as error:
        raise Problem("architecture-refused", error.detail) from None


class SharedDetector(WatermarkDetector):
    """Detector that shares everything independent of the key with other claims.

    Claims with one architecture and reference share the verifier model. The kernels of a suspect model are
    read once for all of them.
    """

    def with_key(self, opened: OpenedClaim) -> SharedDetector:
        """Return the detector of another key with the same reference. Only for key-derived heads."""
        other = copy.copy(self)
        other.spec = opened.spec
        return other.with_raw_key(opened.key)

    def without_key_data(self) -> SharedDetector:
        """Return a copy without everything that a key determines: all that `with_key` needs."""
        other = copy.copy(self)
        other.readouts = tuple(readout.without_key_data() for readout in self.readouts)
        other.labels = self.labels[:0]
        return other

    @property
    def model_bytes(self) -> dict[int, int]:
        """Bytes of each model of the read-outs, by its `id`: detectors may share models."""
        return {id(readout.model): readout.model.byte_count for readout in self.readouts}

    @property
    def key_bytes(self) -> int:
        """Bytes of all tensors that the key determines."""
        return sum(readout.key_bytes for readout in self.readouts)

    @torch.no_grad()
    def read_untrusted(self, tensors: Mapping[str, Tensor]) -> Iterator[SuspectReading]:
        """Return the same readings as `WatermarkDetector.read_untrusted`.

        A `LazySafetensors` caches its readings for the models of the read-outs that were used last, unless
        the file has the kernels several times.
        """
        if not isinstance(tensors, LazySafetensors):
            yield from super().read_untrusted(tensors)
            return
        models = tuple(readout.model for readout in self.readouts)
        if tensors.cached is not None and tensors.cached.models == models:
            yield from tensors.cached.readings
            return
        readings: list[SuspectReading] = []
        for reading in super().read_untrusted(tensors):
            readings = [*readings, reading][: _CACHED_READINGS + 1]
            yield reading
            tensors.release_tensors()
        if len(readings) <= _CACHED_READINGS:
            tensors.cache_readings(CachedReadings(models, tuple(readings)))


def detector_for_claim(
    opened: OpenedClaim, factories: Mapping[str, Factory] | None = None, *, device: str = "cpu"
) -> SharedDetector:
    """Build the detector of a claim that has passed `check_compute_budget`.

    Args:
        opened: the claim.
        factories: trusted factories by name.
        device: torch device.

    Raises:
        Problem: the claim does not fit its architecture.
    """
    try:
        with _SkipInit():
            return SharedDetector(
                opened.opening, Reference.from_bytes(opened.reference), head=opened.head, device=device,
                factories=factories,
            )  # fmt: skip
    except MTLSignError as error:
        raise problem_from_error(error, about="bundle") from None
    except (RuntimeError, ValueError) as error:
        detail = f"The claim does not fit its architecture ({type(error).__name__}). Check the spec."
        raise Problem("bad-bundle", detail) from None
