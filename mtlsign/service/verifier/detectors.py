"""From an opened claim to its test: what the claim would cost is known before any of it is spent."""

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
from mtlsign.models.checkpoints import select_tensors_untrusted
from mtlsign.models.factories import Factory
from mtlsign.models.taps import forward_to_taps
from mtlsign.service.problems import Problem, problem_from_error
from mtlsign.service.verifier.claim_bundle import OpenedClaim
from mtlsign.service.verifier.lazy_safetensors import LazySafetensors
from mtlsign.watermark.keys.spec import Spec
from mtlsign.watermark.verification.detector import WatermarkDetector, watermark_dataset
from mtlsign.watermark.verification.graph import exact_fp32
from mtlsign.watermark.verification.heads import KeyDerivedHead
from mtlsign.watermark.verification.reference import Reference

MAX_IMAGES = 2**26
"""Numbers in a key set's images: 256 MiB of float32."""


class _SkipInit(TorchFunctionMode):
    """Networks are built without drawing their values, which the verifier's graph never uses."""

    _DRAWS = frozenset({torch.Tensor.normal_, torch.Tensor.uniform_, torch.nn.init.kaiming_normal_,
                        torch.nn.init.kaiming_uniform_, torch.nn.init.trunc_normal_})  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._DRAWS:
            return args[0] if args else (kwargs or {}).get("tensor")
        return func(*args, **(kwargs or {}))


def check_compute_budget(
    spec: Spec, settings: ServiceSettings, factories: Mapping[str, Factory] | None = None
) -> float:
    """Build the claim's architecture on the meta device, where it costs nothing, and bound what it will cost.

    Returns the work of one claim in 10^9 operations. Raises: Problem `architecture-refused`.
    """
    c = spec.carrier
    if spec.n * c.channels * c.height * c.width > MAX_IMAGES:
        raise Problem("architecture-refused", f"the key set has over {MAX_IMAGES} numbers; verify it at home")
    largest = 0

    def measure(module: Any, args: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, output.numel())

    try:
        with torch.device("meta"):
            net = architectures.build(spec.graph, factories=factories).train()
            images = torch.empty(spec.n, c.channels, c.height, c.width)
        if sum(p.numel() for p in net.parameters()) > architectures.MAX_PARAMETERS:
            raise Problem("architecture-refused", f"over {architectures.MAX_PARAMETERS:,} parameters")
        handles = [module.register_forward_hook(measure) for module in net.modules()]
        with torch.no_grad(), FlopCounterMode(display=False) as work:
            forward_to_taps(net, images, spec.taps)
        for handle in handles:
            handle.remove()
    except MTLSignError as error:
        raise Problem("architecture-refused", str(error)) from None
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise Problem(
            "architecture-refused", f"it cannot run on its key set ({type(error).__name__})"
        ) from None
    gflop = float(work.get_total_flops()) / 1e9
    if largest > settings.max_numbers or gflop > settings.max_gflop:
        raise Problem(
            "architecture-refused",
            f"it takes {gflop:,.0f} GFLOP and a feature map of {largest:,} numbers; {settings.max_gflop:,.0f} and "
            f"{settings.max_numbers:,} are allowed here",
        )
    return gflop


class SharedDetector(WatermarkDetector):
    """A claim's test that shares what does not depend on the key: claims with one architecture and reference
    have one graph, and a model's kernels are brought into its frame once.
    """

    def like(self, opened: OpenedClaim) -> SharedDetector:
        """The test of another key in the same graph. Only for keyed heads."""
        other = copy.copy(self)
        other.key, other.spec = opened.key, opened.spec
        images, bits = watermark_dataset(other.spec, other.key)
        other.images, other.labels = images.to(self.device), bits.to(self.device)
        other.head = KeyDerivedHead(other.key, self.d, self.device)
        return other

    def without_key_set(self) -> SharedDetector:
        """What `like` needs of this one, for keeping."""
        other = copy.copy(self)
        other.images, other.labels = self.images[:0], self.labels[:0]
        return other

    @property
    def size(self) -> int:
        """Bytes of the key set's images."""
        return self.images.numel() * self.images.element_size()

    @cached_property
    def d(self) -> int:
        """Width of the features."""
        return self._width()

    @torch.no_grad()
    def score_state_dict(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, str | None]:
        """As `Probe.scores`, bit for bit; a `Suspect` keeps its kernels in the frame of the last graph."""
        if not isinstance(tensors, LazySafetensors):
            return super().score_state_dict(tensors)
        if tensors.framed is None or tensors.framed[0] is not self.graph:
            tensors.keep_framed(self.graph, *self._framed(tensors))
        assert tensors.framed is not None
        _, kernels, problem = tensors.framed
        if problem is not None:
            return None, problem
        with exact_fp32():
            scores = self.head(self.graph.features(kernels, self.images, pooled=self.pooled)).cpu()
        return (scores, None) if torch.isfinite(scores).all() else (None, "its values overflow in float32")

    def _framed(self, suspect: LazySafetensors) -> tuple[dict[str, Tensor], str | None]:
        wanted = dict(self.graph.kernels)
        gammas = {self.graph.gammas[name]: (wanted[name][0],) for name in self.graph.gammas}
        mapped = select_tensors_untrusted(wanted, suspect, optional=gammas)
        if mapped.problem is not None:
            return {}, mapped.problem
        kernels = self.graph.read({name: t.to(self.device) for name, t in mapped.tensors.items()})
        with exact_fp32():
            return self.graph.into_frame(kernels), None


def detector_for_claim(
    opened: OpenedClaim, factories: Mapping[str, Factory] | None = None, *, device: str = "cpu"
) -> SharedDetector:
    """The claim's test. `check_work` comes first. Raises: Problem."""
    try:
        with _SkipInit():
            return SharedDetector(
                opened.opening, Reference.from_bytes(opened.reference), head=opened.head, device=device,
                factories=factories,
            )  # fmt: skip
    except MTLSignError as error:
        raise problem_from_error(error, about="bundle") from None
    except (RuntimeError, ValueError) as error:
        raise Problem(
            "bad-bundle", f"the claim does not fit its architecture ({type(error).__name__})"
        ) from None
