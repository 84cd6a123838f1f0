"""Taps: outputs of early modules of a network, and the weights that these outputs depend on.

Both are observed by hooks. The network is not changed, and nothing after the last tap is computed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtlsign.errors import ModelError
from mtlsign.models.batch_norms import is_batch_norm
from mtlsign.models.recurrent_layers import is_recurrent


class _StopForward(BaseException):
    """End of a forward pass after the last tap. Not an `Exception`, so that no model catches it."""


def forward_to_taps(
    model: nn.Module, x: Tensor, taps: Sequence[str], *, call: Callable[[Tensor], Any] | None = None
) -> list[Tensor]:
    """Return the outputs of the modules `taps` for the batch `x`; nothing after them is computed.

    Works under autograd and torch.func, but not in two threads on one model at the same time.

    Args:
        model: the network.
        x: one batch.
        taps: module names. A module that runs more than once gives its first output.
        call: runs the model in another way, such as through torch.func.functional_call.

    Returns:
        Outputs in the order of `taps`.

    Raises:
        ModelError: a tap does not exist, is not reached, or returns no tensor.
    """
    modules = dict(model.named_modules())
    if not taps:
        raise ModelError("No tap is given. Name at least one module.", field="taps")
    for tap in taps:
        if not tap or tap not in modules:
            raise _unknown_tap(tap, modules, "The model has no module")
    outputs: dict[str, Tensor] = {}
    requested = set(taps)

    def store(tap: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if tap in outputs:
                return
            if not isinstance(output, Tensor):
                raise ModelError(
                    f"The output of {tap!r} is a {type(output).__name__}, not a tensor. Tap another module.",
                    field="taps",
                )
            last = len(outputs) + 1 == len(requested)
            outputs[tap] = output if last else output.clone()  # later in-place operations must not change it
            if last:
                raise _StopForward

        return hook

    handles = [modules[tap].register_forward_hook(store(tap)) for tap in sorted(requested)]
    try:
        (call or model)(x)
    except _StopForward:
        return [outputs[tap] for tap in taps]
    finally:
        for handle in handles:
            handle.remove()
    unreached = next(tap for tap in taps if tap not in outputs)
    raise _unknown_tap(unreached, modules, "The forward pass never calls the module")


def _unknown_tap(tap: str, modules: Mapping[str, nn.Module], reason: str) -> ModelError:
    others = [name for name in modules if name and name != tap]
    near = difflib.get_close_matches(tap, others, n=3, cutoff=0.3) or others[:3]
    return ModelError(f"{reason} {tap[:80]!r}. The nearest names are {', '.join(near)}.", field="taps")


def last_layer(model: nn.Module) -> str:
    """Return the name of the last linear layer, or of the last module without children if there is none."""
    leaves = [name for name, module in model.named_modules() if name and not list(module.children())]
    linear = [name for name in leaves if isinstance(model.get_submodule(name), nn.Linear)]
    name: str = (linear or leaves)[-1]
    return name


LayerKind = Literal["conv", "linear", "recurrent", "attention", "product", "other"]


@dataclass(frozen=True)
class TappedLayer:
    """Weight that is used before the last tap.

    Attributes:
        conv: name of its module.
        batch_norm: name of the batch norm that receives the module's unchanged output; None without one.
        kind: "conv" (kernel [out, in/groups, ...]), "linear" ([out, in]), "recurrent" (one of the matrices
            [gates * hidden, in] of an LSTM or GRU), "attention" (products of an attention layer's matrices,
            see `attention_layers.py`), "product" (of two kernels, see `linear_channels.py`) or "other".
            `tapped_layers` returns no products.
        weight: name of the parameter, or of the products.
    """

    conv: str
    batch_norm: str | None
    kind: LayerKind
    weight: str

    @property
    def key(self) -> str:
        """Name of the layer in a reference: that of its module, or of the weight if a module has several."""
        return self.weight if self.kind in ("recurrent", "attention", "product") else self.conv


class _ParameterUseRecorder(TorchDispatchMode):
    """Record of the given tensors that operations read, in order of first use."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.seen: dict[str, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, Tensor) and id(leaf) in self.names:
                self.seen.setdefault(self.names[id(leaf)])
        return func(*args, **(kwargs or {}))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode without gradients; restore the modes of its modules at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def tapped_parameters(
    model: nn.Module, taps: Sequence[str], sample: Tensor, *, buffers: bool = True
) -> list[str]:
    """Return the names of the parameters and buffers that the network reads before the last tap.

    Args:
        model: the network, in any mode.
        taps: module names.
        sample: one batch [n, C, H, W] for an evaluation pass; num_batches_tracked is therefore absent.
        buffers: whether to return buffers, too.

    Returns:
        Names in order of first use.

    Raises:
        ModelError: as `forward_to_taps`.
    """
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    if buffers:
        names |= {id(tensor): name for name, tensor in model.named_buffers()}
    with eval_mode(model), _ParameterUseRecorder(names) as uses:
        forward_to_taps(model, sample, taps)
    return list(uses.seen)


def tapped_buffers(model: nn.Module, taps: Sequence[str], sample: Tensor) -> list[str]:
    """Return the names of the floating-point buffers that the network reads before the last tap.

    Examples are the mean and deviation of the inputs, and the statistics of a tracked instance norm. The
    buffers of batch norms are absent, because a verifier replaces them.

    Args:
        model: the network, in any mode.
        taps: module names.
        sample: one batch [n, C, H, W].

    Raises:
        ModelError: as `forward_to_taps`.
    """
    modules = dict(model.named_modules())
    buffers = {
        name: buffer
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and not is_batch_norm(modules[name.rpartition(".")[0]])
    }
    return [name for name in tapped_parameters(model, taps, sample) if name in buffers]


def tapped_layers(model: nn.Module, taps: Sequence[str], sample: Tensor) -> list[TappedLayer]:
    """Return the weights of two or more dimensions that are used before the last tap.

    Args:
        model: the network, in any mode.
        taps: module names.
        sample: one batch [n, C, H, W].

    Returns:
        Layers in execution order. Transposed convolutions, position embeddings and the like are "other";
        they have no `batch_norm`.

    Raises:
        ModelError: as `forward_to_taps`.
    """
    modules = dict(model.named_modules())
    outputs: dict[int, tuple[str, Tensor, int]] = {}
    pairs: dict[str, str] = {}
    called: set[str] = set()

    def record_output(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            called.add(name)
            if isinstance(output, Tensor):  # the reference keeps its id unique
                outputs[id(output)] = (name, output, output._version)

        return hook

    def record_input(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            source = outputs.get(id(args[0])) if args else None
            if source is not None and source[1]._version == source[2]:
                pairs.setdefault(source[0], name)

        return hook

    handles = []
    for name, module in modules.items():
        if isinstance(module, _ConvNd | nn.Linear | nn.LSTM | nn.GRU):
            handles.append(module.register_forward_hook(record_output(name)))
        elif is_batch_norm(module):
            handles.append(module.register_forward_pre_hook(record_input(name)))
    try:
        names = tapped_parameters(model, taps, sample, buffers=False)
    finally:
        for handle in handles:
            handle.remove()
    parameters = dict(model.named_parameters())
    return [_layer(name, modules, pairs, called) for name in names if parameters[name].ndim >= 2]


def _layer(
    weight: str, modules: Mapping[str, nn.Module], pairs: Mapping[str, str], called: Set[str]
) -> TappedLayer:
    """Return the layer of a weight; a module that another one reads without calling it is "other"."""
    owner, _, leaf = weight.rpartition(".")
    module = modules[owner]
    kind: LayerKind = "other"
    if leaf.startswith("weight_") and owner in called and is_recurrent(module):
        kind = "recurrent"
    if leaf == "weight" and owner in called:
        if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
            kind = "conv"
        elif isinstance(module, nn.Linear):
            kind = "linear"
    return TappedLayer(owner, pairs.get(owner) if kind != "other" else None, kind, weight)
