"""Early feature maps of a network by module name, and the weights they depend on, found by hooks.

Nothing of the network changes and nothing past the last tap is computed (issue 3, item 5; design decision 7).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtlsign.errors import ModelError


def batch_norm_types() -> tuple[type[nn.Module], ...]:
    """What counts as a batch norm (timm's BatchNormAct2d is one of these by inheritance)."""
    return (_BatchNorm,)


class _StopForward(BaseException):
    """Ends a forward pass after the last tap; not an Exception, so that no model swallows it."""


def forward_to_taps(
    model: nn.Module, x: Tensor, taps: Sequence[str], *, call: Callable[[Tensor], Any] | None = None
) -> list[Tensor]:
    """Outputs of the modules `taps` for the batch `x`, in the order asked; nothing later is computed.

    `call` runs the model in another way, for instance through torch.func.functional_call. A module that runs
    more than once gives its first output. Works under autograd and torch.func, not for two threads on one
    model at the same time.
    Raises ModelError for a tap that does not exist, is not reached, or gives no tensor.
    """
    modules = dict(model.named_modules())
    if not taps:
        raise ModelError("no tap given: name at least one module", field="taps")
    for tap in taps:
        if not tap or tap not in modules:
            raise _unknown_tap(tap, modules, "the model has no module")
    found: dict[str, Tensor] = {}
    wanted = set(taps)

    def keep(tap: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if tap in found:
                return
            if not isinstance(output, Tensor):
                raise ModelError(
                    f"the output of {tap!r} is a {type(output).__name__}, not a tensor: tap another module",
                    field="taps",
                )
            last = len(found) + 1 == len(wanted)
            found[tap] = output if last else output.clone()  # a later in-place operation must not reach it
            if last:
                raise _StopForward

        return hook

    handles = [modules[tap].register_forward_hook(keep(tap)) for tap in sorted(wanted)]
    try:
        (call or model)(x)
    except _StopForward:
        return [found[tap] for tap in taps]
    finally:
        for handle in handles:
            handle.remove()
    missed = next(tap for tap in taps if tap not in found)
    raise _unknown_tap(missed, modules, "the forward pass never calls the module")


def _unknown_tap(tap: str, modules: Mapping[str, nn.Module], why: str) -> ModelError:
    others = [name for name in modules if name and name != tap]
    near = difflib.get_close_matches(tap, others, n=3, cutoff=0.3) or others[:3]
    return ModelError(f"{why} {tap[:80]!r}: the nearest names are {', '.join(near)}", field="taps")


@dataclass(frozen=True)
class TappedLayer:
    """A weight used before the last tap.

    `conv` is the name of its module, `bn` of the batch norm that takes that module's output unchanged (or
    None), `weight` of the parameter itself.
    """

    conv: str
    bn: str | None
    kind: Literal["conv", "linear", "other"]
    weight: str


class _ParameterUseRecorder(TorchDispatchMode):
    """Notes, in order, which of the given tensors an operation reads."""

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
def _eval_mode(model: nn.Module) -> Iterator[None]:
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
    """Names of the parameters (and buffers) that the network reads up to the last tap, in order of first use.

    Observed on one evaluation pass over `sample` [n, C, H, W], so num_batches_tracked is absent. Raises
    ModelError as `forward_to_taps`.
    """
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    if buffers:
        names |= {id(tensor): name for name, tensor in model.named_buffers()}
    with _eval_mode(model), _ParameterUseRecorder(names) as uses:
        forward_to_taps(model, sample, taps)
    return list(uses.seen)


def tapped_layers(model: nn.Module, taps: Sequence[str], sample: Tensor) -> list[TappedLayer]:
    """The weights of two or more dimensions used before the last tap, in execution order.

    `sample` is one batch [n, C, H, W]. `kind` is "conv" (kernel [out, in/groups, ...]), "linear" ([out, in])
    or "other" (transposed convolutions, position embeddings, ...), for which `bn` is None.
    Raises ModelError as `forward_to_taps`.
    """
    modules = dict(model.named_modules())
    outputs: dict[int, tuple[str, Tensor, int]] = {}
    pairs: dict[str, str] = {}

    def produced(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):  # kept alive, so that its id stays its own
                outputs[id(output)] = (name, output, output._version)

        return hook

    def consumed(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            source = outputs.get(id(args[0])) if args else None
            if source is not None and source[1]._version == source[2]:
                pairs.setdefault(source[0], name)

        return hook

    handles = []
    for name, module in modules.items():
        if isinstance(module, _ConvNd | nn.Linear):
            handles.append(module.register_forward_hook(produced(name)))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(consumed(name)))
    try:
        used = tapped_parameters(model, taps, sample, buffers=False)
    finally:
        for handle in handles:
            handle.remove()
    parameters = dict(model.named_parameters())
    return [_layer(name, modules, pairs) for name in used if parameters[name].ndim >= 2]


def _layer(weight: str, modules: Mapping[str, nn.Module], pairs: Mapping[str, str]) -> TappedLayer:
    owner, _, leaf = weight.rpartition(".")
    module = modules[owner]
    kind: Literal["conv", "linear", "other"] = "other"
    if leaf == "weight" and isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        kind = "conv"
    elif leaf == "weight" and isinstance(module, nn.Linear):
        kind = "linear"
    return TappedLayer(owner, pairs.get(owner) if kind != "other" else None, kind, weight)
