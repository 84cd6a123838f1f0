"""Stages of a network, read from its data flow and not from the names of its modules.

A cut is a module whose output is all that the rest of the network reads, besides features of higher
resolution that skip connections keep. A stage is a run of cuts with nearly equal resolution and at least two
weight layers. A network with one resolution, such as a vision transformer, has its blocks as stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtlsign.models.taps import eval_mode

#: Weight layers that make a stage; one layer is a stem.
_STAGE_LAYERS = 2
#: Ratio of positions below which two resolutions are one; a stride of 2 gives 4.
_NEARLY_EQUAL = 2.5


@dataclass(frozen=True)
class _Cut:
    """Module whose output is all that the later layers read.

    Attributes:
        name: name of the outermost module with this output.
        positions: pixels or tokens of the output.
        layers: weight layers that have run until its end.
        inner_layers: weight layers that have run inside the module.
    """

    name: str
    positions: int
    layers: int
    inner_layers: int


@dataclass(frozen=True)
class _Output:
    """Output of one call of a module; `time` counts the operations before its end."""

    name: str
    tensor: Tensor
    time: int
    layers: int
    inner_layers: int


class _DataFlow(TorchDispatchMode):
    """Record of the tensors that depend on the input: when each is made and last read.

    Tensors are identified by their storage, so that views and in-place operations are one node. The record
    keeps them alive, because storages of freed tensors are used again.
    """

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.time = 0
        self.made: dict[int, int] = {node(inputs): -1}
        self.last_read: dict[int, int] = {}
        self.positions: dict[int, int | None] = {node(inputs): positions_of(inputs, len(inputs))}
        self._samples = len(inputs)
        self._alive: list[Tensor] = [inputs]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        sources = [node(leaf) for leaf in leaves if node(leaf) in self.made]
        if sources:
            self.last_read |= dict.fromkeys(sources, self.time)
            for output in tree_leaves(result):
                if isinstance(output, Tensor) and output.is_floating_point():
                    self._alive.append(output)
                    if self.made.setdefault(node(output), self.time) == self.time:
                        self.positions[node(output)] = positions_of(output, self._samples)
            self.time += 1
        return result


def node(tensor: Tensor) -> int:
    """Return the number of a tensor's storage."""
    return int(tensor.untyped_storage()._cdata)


def positions_of(tensor: Tensor, samples: int) -> int | None:
    """Return the pixels or tokens of [n, C, H, W], [n, H, W, C] or [n, T, C]; None for other shapes."""
    shape = tuple(tensor.shape)
    if len(shape) not in (3, 4) or shape[0] != samples:
        return None
    if len(shape) == 3:
        return shape[1]
    channels_last = shape[1] == shape[2] and shape[2] != shape[3]
    return shape[1] * shape[2] if channels_last else shape[2] * shape[3]


def stages_of(model: nn.Module, sample: Tensor) -> list[str]:
    """Return the names of the modules that end the stages, in execution order.

    Args:
        model: any network, in any mode.
        sample: one batch [n, C, H, W] with n of 2 or more.

    Returns:
        Module names; empty for a network without features on pixels or tokens.
    """
    cuts = _cuts(model, sample)
    stages: list[list[_Cut]] = []
    layers = 0
    for run in _runs(cuts):
        stage = [cut for cut in run if cut.layers - layers >= _STAGE_LAYERS]
        stages += [stage] if stage else []
        layers = run[-1].layers
    if not stages:
        return [cuts[-1].name] if cuts and cuts[-1].layers else []
    if len(stages) == 1:
        blocks = [cut.name for cut in stages[0] if cut.inner_layers >= _STAGE_LAYERS]
        return blocks or [stages[0][-1].name]
    return [_last_of_outermost(stage).name for stage in stages]


def _runs(cuts: Sequence[_Cut]) -> list[list[_Cut]]:
    """Divide the cuts into runs of nearly equal resolution, which convolutions without padding reduce."""
    runs: list[list[_Cut]] = []
    for cut in cuts:
        if runs and 1 / _NEARLY_EQUAL < cut.positions / runs[-1][-1].positions < _NEARLY_EQUAL:
            runs[-1].append(cut)
        else:
            runs.append([cut])
    return runs


def _last_of_outermost(stage: Sequence[_Cut]) -> _Cut:
    """Return the last cut at the outermost level; a deeper one may belong to the next stage."""
    level = min(cut.name.count(".") for cut in stage)
    return next(cut for cut in reversed(stage) if cut.name.count(".") == level)


def _cuts(model: nn.Module, sample: Tensor) -> list[_Cut]:
    """Return the cuts of a network in execution order, one for each tensor."""
    flow, outputs = _record(model, sample)
    cuts: dict[tuple[int, int], _Cut] = {}
    for output in outputs:
        place, positions = node(output.tensor), positions_of(output.tensor, len(sample))
        if positions is None or place not in flow.made or not _is_cut(flow, output, positions):
            continue
        # Modules end from the innermost to the outermost, which so replaces the others.
        cuts[place, output.time] = _Cut(output.name, positions, output.layers, output.inner_layers)
    return list(cuts.values())


def _is_cut(flow: _DataFlow, output: _Output, positions: int) -> bool:
    """Return whether later layers read no other tensor of this or a lower resolution."""
    own = node(output.tensor)
    for other, made in flow.made.items():
        if other == own or made >= output.time or flow.last_read.get(other, -1) < output.time:
            continue
        other_positions = flow.positions[other]
        if positions <= 1 or other_positions is None or other_positions <= positions:
            return False
    return True


def _record(model: nn.Module, sample: Tensor) -> tuple[_DataFlow, Sequence[_Output]]:
    """Run the network once; return its data flow and the outputs of its modules in order of their ends."""
    flow, outputs = _DataFlow(sample), []
    executed = 0
    starts: dict[str, int] = {}

    def start(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            starts[name] = executed

        return hook

    def end(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal executed
            executed += isinstance(module, _ConvNd | nn.Linear | nn.MultiheadAttention)
            if isinstance(output, Tensor):
                outputs.append(_Output(name, output, flow.time, executed, executed - starts[name]))

        return hook

    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(start(name)))
            handles.append(module.register_forward_hook(end(name)))
    try:
        with eval_mode(model), flow:
            model(sample)
    finally:
        for handle in handles:
            handle.remove()
    return flow, outputs
