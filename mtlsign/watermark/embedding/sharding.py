"""Networks whose parameters, gradients and moments are divided among the ranks (FSDP2 of PyTorch).

Each block is one unit: it is gathered for its forward and its backward pass, and its gradients are summed and
divided by `fully_shard`. The watermark reads whole matrices, so that all units are gathered once in each step
of phase 2. The optimizer works on the local parts as plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import SettingsError
from mtlsign.models.activation_checkpointing import repeated_blocks
from mtlsign.models.loading import load_tensors
from mtlsign.watermark.embedding.worker import State, WorkerContext


def is_sharded(settings: EmbedSettings, worker: WorkerContext) -> bool:
    """Return whether the settings divide the network among several ranks.

    Raises:
        SettingsError: another setting does not allow it.
    """
    if settings.sharding == "none" or worker.world_size == 1:
        return False
    if settings.adapter is not None or settings.lambda2:
        raise SettingsError(
            "A sharded network has neither perturbed copies nor an adapter. Set --lambda2 0, and omit "
            "--adapter or --sharding.",
            field="sharding",
        )
    if not settings.phase2.distillation and not settings.phase2.task_loss:
        raise SettingsError(
            "A sharded network needs a primary loss in phase 2. Set --phase2.distillation.", field="sharding"
        )
    return True


class ShardedNetwork:
    """Sharded network and the local parts of its parameters.

    Args:
        model: the network, equal on all ranks; it is sharded in place.
        sum_gradients: whether gradients are added over the ranks instead of averaged.

    Raises:
        SettingsError: the network has batch norms, whose statistics would differ from those of replicas.
    """

    def __init__(self, model: nn.Module, *, sum_gradients: bool = False) -> None:
        if any(isinstance(module, _BatchNorm) for module in model.modules()):
            raise SettingsError(
                "A network with batch norms is not sharded. Omit --sharding, and lower the batch if memory "
                "is short.",
                field="sharding",
            )
        self._model = model.to(memory_format=torch.contiguous_format)  # the only one that can be divided
        for module in (*repeated_blocks(model).values(), model):
            fully_shard(module)
        for unit in _units(model):
            if sum_gradients:
                unit.set_force_sum_reduction_for_comms(True)
                unit.set_gradient_divide_factor(1.0)
        self.local = {
            name: nn.Parameter(_sharded(parameter).to_local().detach(), parameter.requires_grad)
            for name, parameter in model.named_parameters()
        }

    def unshard(self) -> dict[str, Tensor]:
        """Gather all parameters; return them and the buffers by name. Their gradients are not yet reduced."""
        for unit in _units(self._model):
            unit.unshard()
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    def pull_gradients(self) -> None:
        """Give the local parts the gradients of the last backward pass; zeros where there is none."""
        for unit in _units(self._model):
            unit.reshard()
        for name, parameter in self._model.named_parameters():
            local, gradient = self.local[name], _sharded(parameter).grad
            if local.requires_grad:
                assert gradient is None or isinstance(gradient, DTensor)
                local.grad = torch.zeros_like(local) if gradient is None else gradient.to_local()
            parameter.grad = None  # otherwise the next backward pass would add to it

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a whole state dict."""
        parameters = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, local in self.local.items():
                local.copy_(_local_part(tensors[name], parameters[name]))
            for name, buffer in self._model.named_buffers():
                if name in tensors:
                    buffer.copy_(tensors[name])

    def whole_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return an optimizer's state dict with whole tensors on rank 0. All ranks must call it."""
        state = optimizer.state_dict()
        parameters = self._parameters_of(optimizer)
        gathered_state = {
            number: {key: _whole(value, parameters.get(number)) for key, value in entries.items()}
            for number, entries in sorted(state["state"].items())
        }
        return state | {"state": gathered_state}

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Load a state dict with whole tensors."""
        parameters = self._parameters_of(optimizer)
        parts = {
            number: {
                key: _local_part(value, parameters[number])
                if number in parameters and value.shape == parameters[number].shape
                else value
                for key, value in entries.items()
            }
            for number, entries in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": parts})

    def _parameters_of(self, optimizer: torch.optim.Optimizer) -> dict[int, nn.Parameter]:
        """Return the sharded parameters by their number in an optimizer of local parts."""
        names = {id(local): name for name, local in self.local.items()}
        parameters = dict(self._model.named_parameters())
        optimized = [p for group in optimizer.param_groups for p in group["params"]]
        return {i: parameters[names[id(p)]] for i, p in enumerate(optimized) if id(p) in names}


def whole_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, sharded: ShardedNetwork | None
) -> dict[str, Any]:
    """Return the states `model` and `optimizer` of a checkpoint with whole tensors.

    Args:
        model: the network.
        optimizer: of its parameters or their local parts.
        sharded: the division of the network, whose ranks must all call this; None without one. Ranks besides
            0, which write no checkpoint, then get empty tensors.
    """
    if sharded is None:
        tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        return {"model": tensors, "optimizer": optimizer.state_dict()}
    tensors = {name: _gather(tensor.detach()) for name, tensor in model.state_dict().items()}
    return {"model": tensors, "optimizer": sharded.whole_optimizer_state(optimizer)}


def load_whole_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sharded: ShardedNetwork | None,
    state: Mapping[str, Any],
) -> None:
    """Load a state of `whole_state`, also one of another number of ranks; see there for the arguments."""
    if sharded is None:
        load_tensors(model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        sharded.load(state["model"])
        sharded.load_optimizer_state(optimizer, state["optimizer"])


def collective_state(make_state: Callable[[], State], sharded: ShardedNetwork | None) -> Callable[[], State]:
    """Return the function that makes a checkpoint, which only one rank calls.

    Args:
        make_state: makes the checkpoint; with a sharded network all ranks must call it together.
        sharded: the division of the network; its state is made now.
    """
    if sharded is None:
        return make_state
    state = make_state()
    return lambda: state


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather a sharded network, so that forward passes need no other rank; nothing for other networks."""
    units = _units(model)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _sharded(parameter: Tensor) -> DTensor:
    assert isinstance(parameter, DTensor)
    return parameter


def _whole(value: Any, parameter: nn.Parameter | None) -> Any:
    """Return the whole tensor of a local part with a parameter's division; other values as they are."""
    if parameter is None or not isinstance(value, Tensor):
        return value
    sharded = _sharded(parameter)
    if value.shape != sharded.to_local().shape or value.dim() == 0:
        return value
    part = DTensor.from_local(
        value, sharded.device_mesh, sharded.placements, shape=sharded.shape, stride=sharded.stride()
    )
    return _gather(part)


def _gather(tensor: Tensor) -> Tensor:
    """Return a whole tensor on the CPU of rank 0, and an empty one on the other ranks."""
    gathered_tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered_tensor.cpu() if distributed.get_rank() == 0 else tensor.new_empty(0)


def _local_part(value: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor."""
    sharded = _sharded(parameter)
    local: Tensor = distribute_tensor(
        value.to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None
    ).to_local()
    return local
