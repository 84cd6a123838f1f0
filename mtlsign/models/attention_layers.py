"""Attention layers of networks: which rows of which matrices are their queries, keys and values.

Layers are recognised by the names of their parts, as PyTorch, timm and transformers use them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mtlsign.models.taps import eval_mode, forward_to_taps, tapped_layers

#: Names of the query, key, value and output matrices of modules with separate ones.
_SEPARATE = (
    ("query", "key", "value", "output"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("to_q", "to_k", "to_v", "to_out"),
)
#: Names of a joint matrix and the output matrix.
_JOINT = (("qkv", "proj"), ("in_proj", "out_proj"), ("qkv", "out_proj"))
_HEADS = ("num_heads", "heads", "num_attention_heads")
_KV_HEADS = ("num_key_value_heads", "kv_heads", "num_kv_heads")


@dataclass(frozen=True)
class MatrixRows:
    """Rows of a matrix, from `start` to `stop`."""

    weight: str
    start: int
    stop: int

    def of(self, matrices: Mapping[str, Tensor]) -> Tensor:
        """Return the rows of the matrix of this name."""
        return matrices[self.weight][self.start : self.stop]


@dataclass(frozen=True)
class AttentionLayer:
    """Matrices of one attention layer.

    Attributes:
        module: its name.
        heads: heads of the queries.
        kv_heads: heads of keys and values; `heads` is a multiple of it.
        query, key, value: rows [heads or kv_heads * head size, in].
        output: name of the matrix [out, heads * head size].
    """

    module: str
    heads: int
    kv_heads: int
    query: MatrixRows
    key: MatrixRows
    value: MatrixRows
    output: str

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of all matrices, each once."""
        return tuple(dict.fromkeys((self.query.weight, self.key.weight, self.value.weight, self.output)))

    @property
    def query_key(self) -> str:
        """Name of the products of queries and keys (`docs/format.md`)."""
        return f"{self.module}.query_key"

    @property
    def value_output(self) -> str:
        """Name of the products of values and outputs."""
        return f"{self.module}.value_output"


def attention_layers(model: nn.Module, taps: Sequence[str], sample: Tensor) -> list[AttentionLayer]:
    """Return the attention layers whose matrices are all used before the last tap, in execution order.

    Args:
        model: the network, in any mode.
        taps: module names.
        sample: one batch.

    Raises:
        ModelError: a tap does not exist, or is not reached.
    """
    modules = dict(model.named_modules())
    used = [layer.weight for layer in tapped_layers(model, taps, sample)]
    layers = [layer for name, module in modules.items() if (layer := _attention_layer(name, module))]
    complete = [layer for layer in layers if set(layer.weights) <= set(used)]
    return sorted(complete, key=lambda layer: used.index(layer.query.weight))


def _attention_layer(name: str, module: nn.Module) -> AttentionLayer | None:
    """Return the matrices of a module that is an attention layer of equal inputs; None for others."""
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None or module.bias_k is not None:
            return None
        size = module.embed_dim
        return _layer(
            name,
            module.num_heads,
            module.num_heads,
            _thirds(f"{name}.in_proj_weight", size),
            f"{name}.out_proj.weight",
            module.out_proj.weight.shape[1],
        )
    heads = _integer(module, _HEADS)
    if not heads:
        return None
    for joint, output in _JOINT:
        first, last = getattr(module, joint, None), getattr(module, output, None)
        if isinstance(first, nn.Linear) and isinstance(last, nn.Linear):
            if first.out_features != 3 * last.in_features:
                return None
            parts = _thirds(f"{name}.{joint}.weight", last.in_features)
            return _layer(name, heads, heads, parts, f"{name}.{output}.weight", last.in_features)
    for names in _SEPARATE:
        linear = [getattr(module, part, None) for part in names]
        if all(isinstance(part, nn.Linear) for part in linear):
            query, key, value, last = linear
            assert isinstance(query, nn.Linear) and isinstance(key, nn.Linear)
            assert isinstance(value, nn.Linear) and isinstance(last, nn.Linear)
            if key.out_features != value.out_features or query.out_features != last.in_features:
                return None
            parts = tuple(
                MatrixRows(f"{name}.{part}.weight", 0, layer.out_features)
                for part, layer in zip(names, (query, key, value), strict=False)
            )
            kv_heads = _integer(module, _KV_HEADS) or heads
            return _layer(name, heads, kv_heads, parts, f"{name}.{names[3]}.weight", last.in_features)
    return None


def _integer(module: nn.Module, names: Sequence[str]) -> int | None:
    """Return a positive whole number of the module or its configuration; None without one."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if type(value) is int and value > 0:
                return value
    return None


def _thirds(weight: str, size: int) -> tuple[MatrixRows, ...]:
    return tuple(MatrixRows(weight, part * size, (part + 1) * size) for part in range(3))


def _layer(
    name: str, heads: int, kv_heads: int, parts: Sequence[MatrixRows], output: str, size: int
) -> AttentionLayer | None:
    """Return the layer if its sizes fit together."""
    query, key, value = parts
    head_size = size // heads
    fits = size % heads == 0 and heads % kv_heads == 0
    if not fits or key.stop - key.start != kv_heads * head_size:
        return None
    return AttentionLayer(name, heads, kv_heads, query, key, value, output)


def preceding_norms(model: nn.Module, taps: Sequence[str], sample: Tensor) -> dict[str, str]:
    """Return the layer norm whose unchanged output each linear or attention layer reads.

    Args:
        model: the network, in any mode.
        taps: module names.
        sample: one batch.

    Returns:
        Name of a module -> name of its norm, for layer norms and RMS norms with a weight.
    """
    outputs: dict[int, tuple[str, Tensor, int]] = {}
    norms: dict[str, str] = {}

    def store(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):  # the reference keeps its id unique
                outputs[id(output)] = (name, output, output._version)

        return hook

    def look_up(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            source = outputs.get(id(tensors[0])) if tensors else None
            if source is not None and source[1]._version == source[2]:
                norms.setdefault(name, source[0])

        return hook

    handles = []
    for name, module in model.named_modules():
        if is_row_norm(module):
            handles.append(module.register_forward_hook(store(name)))
        elif isinstance(module, nn.Linear | nn.MultiheadAttention):
            handles.append(module.register_forward_pre_hook(look_up(name), with_kwargs=True))
    try:
        with eval_mode(model):
            forward_to_taps(model, sample, taps)
    finally:
        for handle in handles:
            handle.remove()
    return norms


def is_row_norm(module: nn.Module) -> bool:
    """Return whether a module divides each vector of a sequence by its length, and has one gain per number.

    These are layer norms and RMS norms over the last dimension, of PyTorch and of other libraries.
    """
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    named = isinstance(module, nn.LayerNorm | nn.RMSNorm) or kind.endswith(("RMSNorm", "LayerNorm"))
    return named and "2d" not in kind and isinstance(weight, Tensor) and weight.dim() == 1


def centres(norm: nn.Module) -> bool:
    """Return whether a norm subtracts the mean of each vector, as layer norms do and RMS norms do not."""
    return "RMS" not in type(norm).__name__
