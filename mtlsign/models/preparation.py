"""Preparation of a module: a plain network with trainable float32 parameters under plain names.

A verifier prepares the network of a factory in the same way, so that both see the same tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import (
    SpectralNorm,
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)
from torch.nn.utils.weight_norm import WeightNorm

from mtlsign.errors import ModelError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the network without wrappers: torch.compile, DataParallel and averaged models.

    Compiled children are replaced by the original ones, in place, so that no tensor name names a wrapper.
    """
    while (inner := _wrapped_network(module)) is not None:
        module = inner
    for name, child in list(module.named_modules()):
        inner = getattr(child, "_orig_mod", None)
        if name and isinstance(inner, nn.Module):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, inner)
    return module


def _wrapped_network(module: nn.Module) -> nn.Module | None:
    """Return the network inside a wrapper; None if the module is no wrapper."""
    inner = getattr(module, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return inner
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    if isinstance(module, wrappers):
        network: nn.Module = module.module
        return network
    return None


def prepare_module(module: nn.Module) -> list[str]:
    """Turn a network without wrappers into one that can be trained in float32, in place.

    Weight norm, spectral norm, pruning masks and other parametrizations are replaced by the weights that they
    give. Tensors become float32 and trainable.

    Args:
        module: the network.

    Returns:
        Names of the weights that replace a parametrization.

    Raises:
        ModelError: the module is TorchScript, has no values yet, or is quantised or sharded.
    """
    _require_trainable_kind(module)
    names = materialise_weights(module)
    _make_trainable(module)
    return names


def _make_trainable(module: nn.Module) -> None:
    """Turn all floating-point tensors into float32, and all parameters into trainable ones."""
    with torch.inference_mode(False), torch.no_grad():
        _replace_inference_tensors(module)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                tensor.data = tensor.data.float()
    module.requires_grad_(True)


def _require_trainable_kind(module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            "The module is TorchScript, which cannot be marked. Pass the Python module from which it was "
            "compiled, with its weights.",
            field="module",
        )
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            problem = "has no shape yet. Run the module once on a batch"
        elif parameter.is_meta and torch.get_default_device().type != "meta":
            problem = "is on the meta device and has no values. Load the weights"
        elif parameter.dtype not in _FLOATS:
            problem = f"is {parameter.dtype}. Mark the network before it is quantised"
        elif type(parameter.data) is not Tensor:
            problem = f"is a {type(parameter.data).__name__}. Pass a module with plain tensors"
        else:
            continue
        raise ModelError(f"The parameter {name[:80]!r} {problem}.", field="module")


def materialise_weights(module: nn.Module) -> list[str]:
    """Replace every parametrized weight by a plain parameter with its value in evaluation mode, in place.

    Args:
        module: a network with `torch.nn.utils.parametrizations`, the older `weight_norm` and `spectral_norm`,
            or masks of `torch.nn.utils.prune`.

    Returns:
        Names of the weights.
    """
    names: list[str] = []
    for path, layer in list(module.named_modules()):
        mode = layer.training
        layer.eval()  # a spectral norm changes its buffers in training mode
        for leaf in _materialise_layer(layer):
            names.append(f"{path}.{leaf}" if path else leaf)
        layer.train(mode)
    return names


def _materialise_layer(layer: nn.Module) -> Iterator[str]:
    if parametrize.is_parametrized(layer):
        for leaf in list(layer.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(layer, leaf, leave_parametrized=True)
            yield leaf
    for hook in list(layer._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(layer, hook.name)
            yield hook.name
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(layer, hook.name)
            _remove_state_dict_hooks(layer)
            yield hook.name
        elif isinstance(hook, prune.BasePruningMethod):
            leaf = str(hook._tensor_name)
            prune.remove(layer, leaf)
            yield leaf


def _remove_state_dict_hooks(layer: nn.Module) -> None:
    """Remove the hooks with which an older spectral norm changes state dicts; torch leaves one of them."""
    for hooks in (layer._state_dict_hooks, layer._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(
                getattr(hook, "hook", hook), SpectralNormStateDictHook | SpectralNormLoadStateDictPreHook
            ):
                del hooks[key]


def _replace_inference_tensors(module: nn.Module) -> None:
    """Replace parameters and buffers that were made in inference mode, which autograd cannot change."""
    replaced: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for leaf, parameter in list(owner._parameters.items()):
            if parameter is not None and parameter.is_inference():
                value = replaced.setdefault(id(parameter), nn.Parameter(parameter.clone()))
                owner._parameters[leaf] = value
        for leaf, buffer in list(owner._buffers.items()):
            if buffer is not None and buffer.is_inference():
                owner._buffers[leaf] = buffer.clone()


@dataclass(frozen=True)
class Preparation:
    """Changes of a prepared module.

    Attributes:
        materialised: names of the weights that replace a parametrization; these changes are permanent.
        types: types of the floating-point tensors before, by name.
    """

    materialised: list[str]
    types: Mapping[str, torch.dtype]

    def in_original_types(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a state dict in the types before the preparation."""
        return {name: tensor.to(self.types.get(name, tensor.dtype)) for name, tensor in tensors.items()}


@contextmanager
def prepared(module: nn.Module) -> Iterator[Preparation]:
    """Prepare a module for embedding; restore the types and the trainability of its parameters at the end.

    Args:
        module: a network without wrappers; it is changed in place.

    Yields:
        The changes.

    Raises:
        ModelError: see `prepare_module`.
    """
    _require_trainable_kind(module)
    names = materialise_weights(module)
    types = _tensor_types(module)
    trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    _make_trainable(module)
    try:
        yield Preparation(names, types)
    finally:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name in types:
                tensor.data = tensor.data.to(types[name])
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trainable[name])


def _tensor_types(module: nn.Module) -> dict[str, torch.dtype]:
    """Return the types of floating-point parameters and buffers by name."""
    return {
        name: tensor.dtype
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if tensor.is_floating_point()
    }
