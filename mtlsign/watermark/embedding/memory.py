"""Memory of the two phases, estimated from shapes before the first step, and what this machine has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import SettingsError
from mtlsign.models import architectures
from mtlsign.models.activation_checkpointing import repeated_blocks
from mtlsign.models.detectors import template_of
from mtlsign.models.factories import Factory
from mtlsign.models.input_spec import ImageSpec, InputSpec, TextSpec
from mtlsign.models.loading import custom_factories
from mtlsign.models.recurrent_layers import is_recurrent
from mtlsign.models.taps import forward_to_taps
from mtlsign.watermark import carriers
from mtlsign.watermark.embedding.commitment import needs_response_bases
from mtlsign.watermark.embedding.detector_memory import detector_values, is_two_stage_detector
from mtlsign.watermark.embedding.worker import WorkerContext

_FLOAT = 4
#: Bytes of libraries that are loaded by the first step, and of small tensors.
_OVERHEAD = 90 * 2**20
_GIB = 2**30
#: Values of one step of a recurrent unit that autograd keeps: gates, cell and output.
_RECURRENT_VALUES = 6
#: Feature maps of the largest size that exist at the same time while a batch norm of float64 is computed.
_MAP_COPIES = 5
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
        phase2: the same with W0, the activations of a batch of phase 2 or of all key images, and the kernels
            of the watermark.
        verification: float64 feature maps of all key images, where a head reads them.
    """

    phase1: int
    bases: int
    phase2: int
    verification: int

    @property
    def peak(self) -> int:
        """The largest of the four."""
        return max(self.phase1, self.bases, self.phase2, self.verification)


@dataclass(frozen=True)
class ActivationValues:
    """Numbers of the activations of one sample.

    Attributes:
        stored: numbers that autograd keeps for the backward pass.
        largest: numbers of the largest output of a module.
    """

    stored: int
    largest: int


def estimate_memory(
    settings: EmbedSettings,
    architecture: Mapping[str, object],
    input_spec: InputSpec,
    *,
    world: int = 1,
    factories: Mapping[str, Factory] | None = None,
    checkpointing: bool = False,
) -> MemoryEstimate | None:
    """Estimate the memory of both phases by running the architecture on the meta device.

    Args:
        settings: complete settings.
        architecture: of the network.
        input_spec: inputs of the task.
        world: workers that divide a batch.
        factories: trusted factories by name.
        checkpointing: whether activations of blocks are computed again in the backward pass.

    Returns:
        The estimate; None for networks that cannot be built or run without values.
    """
    try:
        with torch.device("meta"):
            network = architectures.build(architecture, factories=factories).to("meta")
        network.train()
        if isinstance(input_spec, ImageSpec) and is_two_stage_detector(network):
            values = detector_values(
                network, input_spec, partial(_stored_values, checkpointing=checkpointing)
            )
        else:
            values = activation_values(network, input_spec, checkpointing=checkpointing).stored
        key_values, largest_map = _key_values(network, input_spec, settings)
    except Exception:  # a custom network can do anything, and errors of others are raised when they are built
        return None
    parameters = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    first, second = (-(-batch // world) for batch in (settings.phase1.batch or 1, settings.phase2.batch))
    moments = 2 if settings.phase1.optimizer == "adam" else 1
    parts = world if settings.sharding == "fsdp" else 1
    # A sharded network gathers one block at a time, and in phase 2 all of them with their gradients. The
    # first worker gathers the network and its moments for a checkpoint.
    divided = (parameters + trained * (1 + moments)) // parts
    phase1 = divided + (0 if parts == 1 else 2 * _largest_unit(network)) + values * first
    if parts > 1:
        phase1 = max(phase1, divided + parameters + trained * moments)
    # W0's activations are not kept. Its largest ones and those of the loss are much smaller than W's. The
    # gradients of the primary batch and of the key images are computed one after the other.
    phase2 = (2 * parameters + 3 * trained) // parts + (0 if parts == 1 else parameters + trained)
    phase2 += max(values * second, key_values) + _KERNEL_COPIES * trained  # over three times the network
    covariances = _covariance_bytes(template_of(network)) if needs_response_bases(settings) else 0
    bases = _FLOAT * 2 * parameters + covariances
    verification = _FLOAT * 2 * parameters + 2 * _FLOAT * _MAP_COPIES * largest_map
    return MemoryEstimate(
        phase1=_FLOAT * phase1 + _OVERHEAD,
        bases=bases + _OVERHEAD,
        phase2=_FLOAT * phase2 + _OVERHEAD,
        verification=verification + _OVERHEAD,
    )


def _largest_unit(network: nn.Module) -> int:
    """Return the numbers of the largest block of a network, or of all that is in no block."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in repeated_blocks(network).values()]
    return max([*blocks, sum(p.numel() for p in network.parameters()) - sum(blocks)])


def _key_values(network: nn.Module, input_spec: InputSpec, settings: EmbedSettings) -> tuple[int, int]:
    """Return how many numbers autograd keeps for all key images, and those of their largest feature map."""
    heads = [head for head in (settings.head, *settings.readouts) if head != "spread"]
    key_inputs = carriers.key_input_spec(input_spec, settings.carrier_size)
    sample = input_spec.sample(2, device="meta")
    stored, largest = 0, 0
    for head in heads:
        taps = architectures.default_taps(network, head, sample)
        if settings.taps is not None and head == settings.head:
            taps = tuple(tap.strip() for tap in settings.taps.split(","))
        sizes = activation_values(network, key_inputs, taps=taps)
        stored, largest = stored + sizes.stored, max(largest, sizes.largest)
    n = settings.key_size or 1024
    return stored * n, largest * n


def _covariance_bytes(network: nn.Module) -> int:
    """Return the bytes of the float64 covariances of all layers, and of working copies of the largest."""
    sizes = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            sizes.append(int(getattr(module, "groups", 1)) * module.weight[0].numel() ** 2)
        elif isinstance(module, nn.LSTM | nn.GRU):
            sizes += [p.shape[1] ** 2 for p in module.parameters() if p.dim() == 2]
    return 8 * (sum(sizes) + _COVARIANCE_COPIES * max(sizes, default=0))


def activation_values(
    network: nn.Module, input_spec: InputSpec, *, taps: Sequence[str] = (), checkpointing: bool = False
) -> ActivationValues:
    """Return how many numbers autograd keeps for one sample: the outputs of all modules without children.

    Modules that change their input in place add nothing.

    Args:
        network: on the meta device.
        input_spec: inputs of the network.
        taps: modules after which the network stops; by default it runs to its end.
        checkpointing: whether activations of blocks are computed again: the outputs of the blocks before a
            block are kept while its activations exist.
    """
    sample = input_spec.sample(2, device="meta")

    def run() -> object:
        return forward_to_taps(network, sample, taps) if taps else network(sample)

    stored, largest = _run_values(network, run, checkpointing=checkpointing)
    blocks = repeated_blocks(network) if checkpointing else {}
    return ActivationValues(stored // 2 + _attention_values(network, input_spec, blocks), largest // 2)


def _stored_values(network: nn.Module, run: Callable[[], object], *, checkpointing: bool = False) -> int:
    return _run_values(network, run, checkpointing=checkpointing)[0]


def _run_values(network: nn.Module, run: Callable[[], object], *, checkpointing: bool) -> tuple[int, int]:
    """Run a function; return the numbers that autograd would keep of a network's outputs, and the largest."""
    blocks = repeated_blocks(network) if checkpointing else {}
    counts: dict[str, int] = defaultdict(int)
    largest, peak = 0, 0

    def record(owner: str, module: nn.Module, args: Any, output: Any) -> None:
        nonlocal largest, peak
        peak = max(peak, counts[""] + (counts[owner] if owner else 0))
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            largest = max(largest, first.numel())
        if isinstance(first, Tensor) and not getattr(module, "inplace", False):
            factor = _RECURRENT_VALUES if is_recurrent(module) else 1
            counts[owner] += factor * first.numel()

    handles = []
    for name, block in blocks.items():
        handles.append(block.register_forward_hook(partial(record, name)))
        handles.append(block.register_forward_hook(partial(record, "")))
    for name, module in network.named_modules():
        if not list(module.children()):
            owner = next((block for block in blocks if name.startswith(f"{block}.")), "")
            handles.append(module.register_forward_hook(partial(record, owner)))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return max(peak, counts[""]), largest


def _attention_values(network: nn.Module, input_spec: InputSpec, blocks: Mapping[str, nn.Module]) -> int:
    """Return the numbers of attention maps of one text, of all layers or of those of the largest block."""
    if not isinstance(input_spec, TextSpec):
        return 0
    heads: dict[str, int] = defaultdict(int)
    for name, module in network.named_modules():
        if hasattr(module, "kv_heads"):
            owner = next((block for block in blocks if name.startswith(f"{block}.")), "")
            heads[owner] += int(getattr(module, "heads", 0))
    stored = heads.pop("", 0)
    return (stored + max(heads.values(), default=0)) * input_spec.length**2


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
    factories: Mapping[str, Factory] | None = None,
) -> bool:
    """Check that this worker has the memory of its phase and of the later ones, before it builds a network.

    Args:
        settings: complete settings.
        architecture: of the network.
        input_spec: inputs of the task.
        worker: this process of the phase.
        phase: phase that begins.
        factories: trusted factories by name; by default those that the architecture names.

    Returns:
        Whether activations must be checkpointed: always if the settings demand it, and by default if they
        would exceed the memory otherwise.

    Raises:
        SettingsError: the worker has too little memory.
    """
    if factories is None:
        factories = custom_factories(architecture)
    mode, available = settings.activation_checkpointing, available_memory(worker.device)

    def needed(checkpointing: bool) -> int | None:
        estimate = estimate_memory(
            settings, architecture, input_spec, world=worker.world_size, factories=factories,
            checkpointing=checkpointing,
        )  # fmt: skip
        if estimate is None:
            return None
        return estimate.peak if phase == 1 else max(estimate.phase2, estimate.verification)

    estimate = needed(mode == "always")
    if estimate is None or available is None or estimate <= available:
        return mode == "always"
    reduced = needed(True) if mode == "auto" else estimate
    assert reduced is not None  # the estimate exists
    require_memory(reduced, available)
    row = {"phase": "clean" if phase == 1 else "mark", "step": 0, "of": 1}
    worker.show_progress(row | {"warning": _checkpointing_warning(estimate, reduced, available)})
    return True


def _checkpointing_warning(estimate: int, reduced: int, available: int) -> str:
    """Return the warning that activations are checkpointed; the arguments are bytes."""
    return (
        f"{estimate / _GIB:.1f} GiB of memory are needed and {available / _GIB:.1f} GiB are free. "
        "Activations are computed again in the backward pass, which needs "
        f"{reduced / _GIB:.1f} GiB and takes longer."
    )


def require_memory(estimate: int, available: int | None) -> None:
    """Raise `SettingsError` if an estimate exceeds what is available."""
    if available is not None and estimate > available:
        raise SettingsError(
            f"Embedding needs about {estimate / _GIB:.1f} GiB of memory in each worker, and "
            f"{max(available, 0) / _GIB:.1f} GiB are free. Lower --phase1.batch or --phase2.batch, or use "
            "--activation-checkpointing always, more workers or a larger machine.",
            field="phase2.batch",
        )
