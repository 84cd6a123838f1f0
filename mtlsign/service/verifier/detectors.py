"""Detectors of opened claims. The cost of a claim is bounded before any of it is spent."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mtlsign.config.service import ServiceSettings
from mtlsign.errors import MTLSignError
from mtlsign.models import architectures
from mtlsign.models.factories import Factory
from mtlsign.models.taps import forward_to_taps
from mtlsign.models.untrusted import select_tensors_untrusted
from mtlsign.service.problems import Problem, problem_from_error
from mtlsign.service.verifier.claim_bundle import OpenedClaim
from mtlsign.service.verifier.lazy_safetensors import LazySafetensors
from mtlsign.watermark.keys.spec import Spec
from mtlsign.watermark.verification.detector import WatermarkDetector, watermark_dataset
from mtlsign.watermark.verification.heads import KeyDerivedHead
from mtlsign.watermark.verification.model import exact_fp32
from mtlsign.watermark.verification.reference import Reference

MAX_IMAGE_ELEMENTS = 2**26
"""Elements of the images of one key set: 256 MiB of float32."""
_RUN_LOCALLY = "Verify the claim on your own machine (jobs/verify.py)."


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
    """Check the cost of a claim by running its architecture on the meta device, which computes nothing.

    Args:
        spec: the claim's spec.
        settings: limits `max_gflop` and `max_activation_elements`.
        factories: trusted factories by name.

    Returns:
        Operations of one claim in units of 10^9.

    Raises:
        Problem: `architecture-refused`.
    """
    carrier = spec.carrier
    if spec.n * carrier.channels * carrier.height * carrier.width > MAX_IMAGE_ELEMENTS:
        detail = f"The images of the key have over {MAX_IMAGE_ELEMENTS:,} elements. {_RUN_LOCALLY}"
        raise Problem("architecture-refused", detail)
    try:
        gflop, largest = _measure(spec, factories)
    except MTLSignError as error:
        raise Problem("architecture-refused", str(error)) from None
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        detail = f"The network cannot process the images of the key ({type(error).__name__})."
        raise Problem("architecture-refused", f"{detail} Check the spec.") from None
    if largest > settings.max_activation_elements or gflop > settings.max_gflop:
        detail = (
            f"The claim takes {gflop:,.0f} GFLOP and a feature map of {largest:,} elements; "
            f"{settings.max_gflop:,.0f} and {settings.max_activation_elements:,} are allowed. {_RUN_LOCALLY}"
        )
        raise Problem("architecture-refused", detail)
    return gflop


def _measure(spec: Spec, factories: Mapping[str, Factory] | None) -> tuple[float, int]:
    """Return the operations (10^9) of a forward pass to the taps and the elements of its largest output."""
    largest = 0

    def record_size(module: Any, args: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, output.numel())

    carrier = spec.carrier
    with torch.device("meta"):
        network = architectures.build(spec.graph, factories=factories).train()
        images = torch.empty(spec.n, carrier.channels, carrier.height, carrier.width)
    if sum(p.numel() for p in network.parameters()) > architectures.MAX_PARAMETERS:
        detail = f"The network has over {architectures.MAX_PARAMETERS:,} parameters. {_RUN_LOCALLY}"
        raise Problem("architecture-refused", detail)
    handles = [module.register_forward_hook(record_size) for module in network.modules()]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward_to_taps(network, images, spec.taps)
    for handle in handles:
        handle.remove()
    return float(counter.get_total_flops()) / 1e9, largest


class SharedDetector(WatermarkDetector):
    """Detector that shares everything independent of the key with other claims.

    Claims with one architecture and reference share the verifier model. The kernels of a suspect model are
    brought into canonical form once for all of them.
    """

    def with_key(self, opened: OpenedClaim) -> SharedDetector:
        """Return the detector of another key with the same verifier model. Only for key-derived heads."""
        other = copy.copy(self)
        other.key, other.spec = opened.key, opened.spec
        images, bits = watermark_dataset(other.spec, other.key)
        other.images, other.labels = images.to(self.device), bits.to(self.device)
        other.head = KeyDerivedHead(other.key, self.d, self.device)
        return other

    def without_key_images(self) -> SharedDetector:
        """Return a copy without images and labels: all that `with_key` needs."""
        other = copy.copy(self)
        other.images, other.labels = self.images[:0], self.labels[:0]
        return other

    @property
    def image_bytes(self) -> int:
        """Bytes of the images of the key."""
        return self.images.numel() * self.images.element_size()

    @cached_property
    def d(self) -> int:
        """Width of the features."""
        return self._width()

    @torch.no_grad()
    def score_state_dict(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, str | None]:
        """Return the same bits as `WatermarkDetector.score_state_dict`.

        A `LazySafetensors` caches its canonical kernels for the verifier model that was used last.
        """
        if not isinstance(tensors, LazySafetensors):
            return super().score_state_dict(tensors)
        if tensors.canonical is None or tensors.canonical[0] is not self.model:
            tensors.cache_canonical(self.model, *self._canonical(tensors))
        assert tensors.canonical is not None
        _, kernels, problem = tensors.canonical
        if problem is not None:
            return None, problem
        with exact_fp32():
            scores = self.head(self.model.features(kernels, self.images, pooled=self.pooled)).cpu()
        if not torch.isfinite(scores).all():
            return None, "its values overflow in float32"
        return scores, None

    def _canonical(self, suspect: LazySafetensors) -> tuple[dict[str, Tensor], str | None]:
        kernels = dict(self.model.weight_shapes)
        mapped = select_tensors_untrusted(kernels, suspect, optional=self.model.optional_shapes)
        if mapped.problem is not None:
            return {}, mapped.problem
        tensors = {name: tensor.to(self.device) for name, tensor in mapped.tensors.items()}
        weights = self.model.select_weights(tensors)
        with exact_fp32():
            return self.model.canonicalize(weights), None


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
