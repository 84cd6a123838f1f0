"""Cost of one claim, measured before anything of its size is built, and its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mtlsign.errors import ArtifactError, MTLSignError
from mtlsign.models import architectures
from mtlsign.models.channel_sets import channel_structure
from mtlsign.models.factories import Factory
from mtlsign.models.residual_stream import residual_stream
from mtlsign.models.taps import forward_to_taps
from mtlsign.watermark import carriers
from mtlsign.watermark.keys.spec import ReadoutSpec, Spec
from mtlsign.watermark.verification.alignment.linear_channels import mix_operations
from mtlsign.watermark.verification.response_bases import MAX_DIRECTIONS
from mtlsign.watermark.verification.sketches import MAX_SKETCH_SIZE

MAX_IMAGE_ELEMENTS = 2**26
"""Elements of the images of one key set: 256 MiB of float32."""
#: Operations of the alignments for each parameter: about 40 products with a sketch of 32 numbers.
ALIGNMENT_OPERATIONS = 2 * 40 * 32
_RUN_LOCALLY = "Verify the claim on your own machine (jobs/verify.py)."


@dataclass(frozen=True)
class ComputeLimits:
    """Limits of one claim. The defaults are those of a council, and the same for all members.

    Attributes:
        gflop: operations in units of 10^9; they bound time.
        elements: elements of one tensor, such as a feature map of the whole key set; they bound memory.
    """

    gflop: float = 3_000
    elements: int = 2**28


def check_claim_budget(
    spec: Spec,
    factories: Mapping[str, Factory] | None = None,
    *,
    limits: ComputeLimits | None = None,
) -> float:
    """Check the cost of a claim by running its architecture on the meta device, which computes nothing.

    Args:
        spec: the claim's spec.
        factories: trusted factories by name.
        limits: limits of the claim.

    Returns:
        Operations of one claim in units of 10^9.

    Raises:
        ArtifactError: the claim costs too much, or its network cannot be built or run.
    """
    limits, carrier = limits or ComputeLimits(), carriers.for_spec(spec)
    samples = max((r.n for r in spec.readouts if r.head.kind != "spread"), default=0)
    if carrier.number_count(samples) > MAX_IMAGE_ELEMENTS:
        raise ArtifactError(
            f"The inputs of the key have over {MAX_IMAGE_ELEMENTS:,} elements. {_RUN_LOCALLY}", field="spec"
        )
    try:
        measured = [_measure(spec, readout, factories) for readout in spec.readouts]
    except MTLSignError as error:
        raise ArtifactError(error.detail, field=error.field or "spec") from None
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise ArtifactError(
            f"The network cannot process the inputs of the key ({type(error).__name__}). Check the spec.",
            field="spec",
        ) from None
    gflop, largest = sum(m[0] for m in measured), max(m[1] for m in measured)
    if largest > limits.elements or gflop > limits.gflop:
        raise ArtifactError(
            f"The claim takes {gflop:,.0f} GFLOP and a tensor of {largest:,} elements; "
            f"{limits.gflop:,.0f} and {limits.elements:,} are allowed. {_RUN_LOCALLY}",
            field="spec",
        )
    return gflop


def _attention_cost(network: nn.Module, taps: Sequence[str], inputs: torch.Tensor) -> tuple[float, int]:
    """Return the operations on products of attention layers, and the elements of the largest product."""
    stream = residual_stream(network, taps, inputs)
    if stream is None:
        return 0.0, 0
    parameters = dict(network.named_parameters())
    operations, largest = 0.0, 0
    for layer in stream.attentions:
        size = stream.size_of(layer)
        elements = layer.heads * size**2
        head_size = parameters[layer.output].shape[1] // layer.heads
        # Both products, their rows in the basis, their sketches, and the comparison of all pairs of heads.
        per_element = 4 * head_size + 2 * MAX_DIRECTIONS + 4 * MAX_SKETCH_SIZE
        operations += elements * per_element + 4.0 * layer.heads * elements / size * MAX_SKETCH_SIZE
        # Up to four times as many blocks are compared with each of W0's, head by head.
        pairs = len(stream.attentions) * 4.0 * layer.heads**2
        operations += 2 * pairs * size * MAX_SKETCH_SIZE
        largest = max(largest, elements)
    widths, count = [stage.size for stage in stream.parts], sum(p.numel() for p in parameters.values())
    turns = sum(60.0 * width**3 for width in widths) + 4.0 * max(widths) * count
    return operations + turns, largest


def _mix_cost(network: nn.Module, taps: Sequence[str], inputs: torch.Tensor) -> float:
    """Return the operations of estimates of mixes of linear channels."""
    if not inputs.is_floating_point():  # no channels, but words
        return 0.0
    shapes = {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
    return mix_operations(channel_structure(network, taps, inputs).sets, shapes)


def _measure(spec: Spec, readout: ReadoutSpec, factories: Mapping[str, Factory] | None) -> tuple[float, int]:
    """Return the operations (10^9) of one read-out and the elements of its largest tensor.

    A spread read-out passes two samples to find the layers, aligns the kernels, estimates mixes, and
    multiplies each kernel with a basis of at most `MAX_DIRECTIONS` columns. A free head multiplies the joined
    features with its first layer.
    """
    spread = readout.head.kind == "spread"
    largest = 0

    def record_size(module: Any, args: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, output.numel())

    samples = 2 if spread else readout.n
    with torch.device("meta"):
        network = architectures.build_template(spec.architecture, factories=factories).train()
        inputs = carriers.for_spec(spec).sample(samples, device="meta")
    parameters = sum(p.numel() for p in network.parameters())
    if parameters > architectures.MAX_PARAMETERS:
        raise ArtifactError(
            f"The network has over {architectures.MAX_PARAMETERS:,} parameters. {_RUN_LOCALLY}", field="spec"
        )
    handles = [module.register_forward_hook(record_size) for module in network.modules()]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = forward_to_taps(network, inputs, readout.taps)
    for handle in handles:
        handle.remove()
    flops = counter.get_total_flops()
    if spread:
        operations, product = _attention_cost(network, readout.taps, inputs)
        operations += float(flops) + (2 * MAX_DIRECTIONS + ALIGNMENT_OPERATIONS) * parameters
        operations += _mix_cost(network, readout.taps, inputs)
        return operations / 1e9, max(largest, product)
    joined = sum(output.numel() for output in outputs)
    hidden = readout.head.hidden or 1
    largest = max(largest, joined, joined // samples * hidden)
    return (float(flops) + 2 * joined * hidden) / 1e9, largest
