"""Norms before the matrices of a network, also if positions are moved between a norm and a matrix.

Windowed attention shifts, pads and divides the outputs of a norm before its matrix reads them. The network
runs once, and every operation that only moves positions passes the norm on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtlsign.models.attention_layers import is_row_norm
from mtlsign.models.channel_operations import MOVES, PADS
from mtlsign.models.taps import eval_mode, forward_to_taps

#: Operations that keep every vector, or add vectors of zeros.
_MOVES = MOVES | PADS | {"_to_copy", "alias", "clone", "contiguous", "detach"}
#: Products with a matrix: places of the vectors and the matrix among the arguments.
_PRODUCTS = {"addmm": (1, 2), "linear": (0, 1), "mm": (0, 1)}


def norms_before_matrices(model: nn.Module, taps: Sequence[str], sample: Tensor) -> dict[str, str]:
    """Return the norm whose outputs each matrix is multiplied with.

    Args:
        model: the network, in any mode; its values have no influence.
        taps: module names.
        sample: one batch.

    Returns:
        Name of a parameter -> name of its norm, for layer norms and RMS norms with a weight. A parameter
        that is multiplied with other vectors first is absent.

    Raises:
        ModelError: a tap does not exist, or is not reached.
    """
    flow = _NormFlow({id(tensor): name for name, tensor in model.named_parameters()})
    handles = [
        module.register_forward_hook(flow.start(name))
        for name, module in model.named_modules()
        if is_row_norm(module)
    ]
    try:
        with eval_mode(model), flow:
            forward_to_taps(model, sample, taps)
    finally:
        for handle in handles:
            handle.remove()
    return {weight: norm for weight, norm in flow.norms.items() if norm}


class _NormFlow(TorchDispatchMode):
    """Record of the norm that each tensor comes from, and of the matrices that read it.

    Tensors are identified by their ids, and kept alive, so that no id is used again.
    """

    def __init__(self, weights: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.norms: dict[str, str] = {}
        self._weights = dict(weights)
        self._sources: dict[int, str] = {}
        self._alive: list[Any] = []

    def start(self, norm: str) -> Callable[..., None]:
        """Return a hook that names the outputs of a norm."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._sources[id(output)] = norm
                self._alive.append(output)

        return hook

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        leaves = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        self._alive += [result, *leaves]
        if name in _PRODUCTS:
            vectors, matrix = (args[place] for place in _PRODUCTS[name])
            weight = self._weights.get(id(matrix))
            if weight is not None:
                self.norms.setdefault(weight, self._sources.get(id(vectors), ""))
        moved = {self._sources.get(id(leaf)) for leaf in leaves} if name in _MOVES else set()
        source = moved.pop() if len(moved) == 1 else None
        for output in tree_leaves(result):
            if not isinstance(output, Tensor):
                continue
            self._sources.pop(id(output), None)  # an operation in place ends the flow
            if source is not None:
                self._sources[id(output)] = source
            if name in _MOVES and leaves and id(leaves[0]) in self._weights and leaves[0].dim() == 2:
                self._weights[id(output)] = self._weights[id(leaves[0])]
        return result
