"""Memory of the two phases, estimated from shapes before the first step, and what this machine has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import SettingsError
from mtlsign.models import architectures
from mtlsign.models.factories import Factory
from mtlsign.models.input_spec import InputSpec, TextSpec
from mtlsign.models.loading import custom_factories
from mtlsign.models.recurrent_layers import is_recurrent
from mtlsign.watermark.embedding.commitment import needs_response_bases
from mtlsign.watermark.embedding.worker import WorkerContext

_FLOAT = 4
#: Bytes of libraries that are loaded by the first step, and of small tensors.
_OVERHEAD = 90 * 2**20
_GIB = 2**30
#: Values of one step of a recurrent unit that autograd keeps: gates, cell and output.
_RECURRENT_VALUES = 6
#: Copies of a layer's kernel while its responses and their gradients are computed.
_KERNEL_COPIES = 3
#: Copies of the largest covariance while its eigenvectors are computed.
_COVARIANCE_COPIES = 3


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes of one worker beyond the loaded libraries and data.

    Attributes:
        phase1: network, gradients, moments of the optimiser, activations of a batch.
        bases: covariances of the inputs of all layers, and the eigenvectors of the largest one.
        phase2: the same with W0, the activations of a batch of phase 2, and the kernels of the watermark.
    """

    phase1: int
    bases: int
    phase2: int

    @property
    def peak(self) -> int:
        """The largest of the three."""
        return max(self.phase1, self.bases, self.phase2)


def estimate_memory(
    settings: EmbedSettings,
    architecture: Mapping[str, object],
    input_spec: InputSpec,
    *,
    world: int = 1,
    factories: Mapping[str, Factory] | None = None,
) -> MemoryEstimate | None:
    """Estimate the memory of both phases by running the architecture on the meta device.

    Args:
        settings: complete settings.
        architecture: of the network.
        input_spec: inputs of the task.
        world: workers that divide a batch.
        factories: trusted factories by name.

    Returns:
        The estimate; None for networks that cannot be built or run without values.
    """
    try:
        with torch.device("meta"):
            network = architectures.build(architecture, factories=factories)
        values = _activation_values(network.train(), input_spec)
    except Exception:  # a custom network can do anything, and errors of others are raised when they are built
        return None
    parameters = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    first, second = (-(-batch // world) for batch in (settings.phase1.batch or 1, settings.phase2.batch))
    moments = 2 if settings.phase1.optimizer == "adam" else 1
    phase1 = parameters + trained * (1 + moments) + values * first
    # W0's activations are not kept. Its largest ones and those of the loss are much smaller than W's.
    phase2 = 2 * parameters + 3 * trained + values * second + _KERNEL_COPIES * trained
    bases = _FLOAT * 2 * parameters + (_covariance_bytes(network) if needs_response_bases(settings) else 0)
    return MemoryEstimate(_FLOAT * phase1 + _OVERHEAD, bases + _OVERHEAD, _FLOAT * phase2 + _OVERHEAD)


def _covariance_bytes(network: nn.Module) -> int:
    """Return the bytes of the float64 covariances of all layers, and of working copies of the largest."""
    sizes = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            sizes.append(int(getattr(module, "groups", 1)) * module.weight[0].numel() ** 2)
        elif isinstance(module, nn.LSTM | nn.GRU):
            sizes += [p.shape[1] ** 2 for p in module.parameters() if p.dim() == 2]
    return 8 * (sum(sizes) + _COVARIANCE_COPIES * max(sizes, default=0))


def _activation_values(network: nn.Module, input_spec: InputSpec) -> int:
    """Return how many numbers autograd keeps for one sample: the outputs of all modules without children."""
    counts: list[int] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            factor = _RECURRENT_VALUES if is_recurrent(module) else 1
            counts.append(factor * first.numel())

    leaves = [module for module in network.modules() if not list(module.children())]
    handles = [module.register_forward_hook(record) for module in leaves]
    try:
        with torch.no_grad():
            network(input_spec.sample(2, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    attention = 0
    if isinstance(input_spec, TextSpec):
        heads = sum(int(getattr(m, "heads", 0)) for m in network.modules() if hasattr(m, "kv_heads"))
        attention = heads * input_spec.length**2
    return sum(counts) // 2 + attention


def available_memory(device: torch.device) -> int | None:
    """Return the free bytes of a device: of a GPU, or of this machine and its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    most, used = group / "memory.max", group / "memory.current"
    if most.exists() and used.exists() and (text := most.read_text().strip()).isdigit():
        limits.append(int(text) - int(used.read_text()))
    return min(limits) if limits else None


def check_memory(
    settings: EmbedSettings,
    architecture: Mapping[str, object],
    input_spec: InputSpec,
    worker: WorkerContext,
    *,
    phase: Literal[1, 2],
) -> None:
    """Check that this worker has the memory of its phase and of the later ones.

    Args:
        settings: complete settings.
        architecture: of the network.
        input_spec: inputs of the task.
        worker: this process of the phase.
        phase: phase that begins.

    Raises:
        SettingsError: it has not.
    """
    world, factories = worker.world_size, custom_factories(architecture)
    estimate = estimate_memory(settings, architecture, input_spec, world=world, factories=factories)
    if estimate is not None:
        require_memory(estimate.peak if phase == 1 else estimate.phase2, available_memory(worker.device))


def require_memory(estimate: int, available: int | None) -> None:
    """Raise `SettingsError` if an estimate exceeds what is available."""
    if available is not None and estimate > available:
        raise SettingsError(
            f"Embedding needs about {estimate / _GIB:.1f} GiB of memory in each worker, and "
            f"{max(available, 0) / _GIB:.1f} GiB are free. Lower --phase1.batch or --phase2.batch, or use "
            "more workers or a larger machine.",
            field="phase2.batch",
        )
