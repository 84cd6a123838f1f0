"""References with extreme and inadmissible values, and references made of the suspect's kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor

from benchmarks.reference_forger import Attempt, Forger, Tensors
from mtlsign.storage.safetensors_io import serialize_safetensors
from mtlsign.watermark.verification.reference import RANGES, WHOLE, ValueRange
from mtlsign.watermark.verification.sketches import random_projection

#: Kinds of tensors whose values are replaced, and all of them at once.
_KINDS = ("gamma", "beta", "eps", "columns", "basis", "sketch", "=", "all")


def _limits(name: str) -> ValueRange:
    return WHOLE if name.startswith("=") else RANGES[name.rpartition("/")[2]]


def _is_kind(name: str, kind: str) -> bool:
    own = "=" if name.startswith("=") else name.rpartition("/")[2]
    return kind in ("all", own)


def _alternating(shape: torch.Size, low: float, high: float) -> Tensor:
    values = torch.full((shape.numel(),), high, dtype=torch.float64)
    values[::2] = low
    return values.reshape(shape)


def _uniform(shape: torch.Size, limits: ValueRange, generator: Generator) -> Tensor:
    return limits.low + (limits.high - limits.low) * torch.rand(
        shape, generator=generator, dtype=torch.float64
    )


def _magnitudes(shape: torch.Size, limits: ValueRange, generator: Generator) -> Tensor:
    """Return values whose logarithms are spread over the whole range."""
    exponents = torch.rand(shape, generator=generator, dtype=torch.float64) * -24
    signs = torch.rand(shape, generator=generator, dtype=torch.float64).sub(0.5).sign()
    values = limits.high * 2**exponents * (signs if limits.low < 0 else 1)
    return values.clamp(limits.low, limits.high)


def _one_column(tensor: Tensor, limits: ValueRange, generator: Generator) -> Tensor:
    """Return zeros with one extreme number in each row."""
    values = torch.zeros(tensor.shape, dtype=torch.float64).reshape(len(tensor), -1)
    values[:, int(torch.randint(values.shape[1], (), generator=generator))] = limits.high
    return values.reshape(tensor.shape)


Filling = Callable[[Tensor, ValueRange, Generator], Tensor]
#: How the numbers of a tensor are replaced. The first group is within the format's ranges, the second is not.
_FILLINGS: dict[str, Filling] = {
    "lowest": lambda t, r, g: torch.full(t.shape, r.low, dtype=torch.float64),
    "highest": lambda t, r, g: torch.full(t.shape, r.high, dtype=torch.float64),
    "zero or lowest": lambda t, r, g: torch.full(t.shape, max(0.0, r.low), dtype=torch.float64),
    "smallest": lambda t, r, g: torch.full(
        t.shape, max(torch.finfo(r.dtype).smallest_normal / 4, r.low), dtype=torch.float64
    ),
    "alternating": lambda t, r, g: _alternating(t.shape, r.low, r.high),
    "uniform": lambda t, r, g: _uniform(t.shape, r, g),
    "all magnitudes": lambda t, r, g: _magnitudes(t.shape, r, g),
    "one column": _one_column,
}
_INVALID: dict[str, Callable[[Tensor], Tensor]] = {
    "one NaN": lambda t: _with_first(t, float("nan")),
    "one infinity": lambda t: _with_first(t, float("inf")),
    "beyond the range": lambda t: _with_first(t, 2.0**25 if t.dtype != torch.float16 else 60_000.0),
    "another type": lambda t: t.double() if t.dtype != torch.float64 else t.float(),
    "another shape": lambda t: t.flatten()[: max(1, t.numel() - 1)].clone(),
}


def _with_first(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.reshape(-1)[0] = value
    return changed


def extremes(forger: Forger) -> Iterator[Attempt]:
    """Yield references with replaced numbers, without end; every fourth key has a keyed read-out as well."""
    index, kinds = 0, [kind for kind in _KINDS if any(_is_kind(name, kind) for name in forger.own.tensors)]
    while True:
        for kind in kinds:
            for filling in (*_FILLINGS, *_INVALID):
                generator = torch.Generator().manual_seed(index)
                yield _extreme(forger, kind, filling, index, generator)
                index += 1


def _extreme(forger: Forger, kind: str, filling: str, index: int, generator: Generator) -> Attempt:
    tensors = dict(forger.own.tensors)
    names = [name for name in tensors if _is_kind(name, kind)]
    if kind != "all" and index % 2:  # one layer instead of all
        names = names[index % len(names) :][:1]
    for name in names:
        limits, tensor = _limits(name), tensors[name]
        if filling in _FILLINGS:
            tensors[name] = _FILLINGS[filling](tensor, limits, generator).to(limits.dtype)
        else:
            tensors[name] = _INVALID[filling](tensor)
    data = serialize_safetensors(tensors)
    statistic = "weighted" if index % 3 == 0 else "count"
    further = [{"head": {"kind": "keyed"}, "taps": ["layer1"], "n": 256}] if index % 4 == 0 else 1
    opening = forger.sign(data, f"extreme {index}", statistic=statistic, readouts=further)
    return Attempt("extreme", f"{kind}: {filling}", opening, data)


def copies(forger: Forger) -> Iterator[Attempt]:
    """Yield references that are made of the suspect's kernels, without end."""
    index = 0
    while True:
        for method, change in _COPIES.items():
            generator = torch.Generator().manual_seed(index)
            data = serialize_safetensors(change(forger, generator))
            tries = (1, 64)[index % 2]
            statistic = ("count", "weighted")[index // 2 % 2]
            opening, _ = forger.best_key(data, f"copy {index}", tries, statistic=statistic)
            yield Attempt("copied", method, opening, data, tries=tries)
            index += 1


def _layers(forger: Forger) -> list[tuple[str, Tensor]]:
    """Return key and kernel of each layer with a basis."""
    names = [n.removesuffix("/basis") for n in forger.own.tensors if n.endswith("/basis")]
    return [(name, forger.suspect[f"{name}.weight"].float()) for name in names]


def _own_basis(make: Callable[[Tensor, Generator], Tensor]) -> Callable[[Forger, Generator], Tensors]:
    """Return a change that makes each basis [fan-in, k] from the rows [O, fan-in] of the kernel."""

    def change(forger: Forger, generator: Generator) -> Tensors:
        tensors = dict(forger.own.tensors)
        for name, kernel in _layers(forger):
            basis = make(kernel.reshape(len(kernel), -1), generator)[:, :256]
            basis = basis / basis.abs().max().clamp(min=1e-12)
            tensors[f"{name}/basis"] = basis.half()[None].contiguous()
        return tensors

    return change


def _random_directions(rows: Tensor, generator: Generator) -> Tensor:
    # At least as many coordinates as bits.
    return rows.T @ torch.randn(len(rows), 32, generator=generator)


def _same(forger: Forger, generator: Generator) -> Tensors:
    return dict(forger.own.tensors)


def _noisy(forger: Forger, generator: Generator) -> Tensors:
    tensors = dict(forger.own.tensors)
    for name, tensor in tensors.items():
        if name.endswith(("/basis", "/sketch")):
            noise = torch.randn(tensor.shape, generator=generator) * 0.1
            tensors[name] = (tensor.float() + noise).clamp(-2, 2).half()
    return tensors


def _foreign_sketch(forger: Forger, generator: Generator) -> Tensors:
    other = forger.others[0].tensors
    return {n: other[n] if n.endswith("/sketch") else t for n, t in forger.own.tensors.items()}


def _foreign_basis(forger: Forger, generator: Generator) -> Tensors:
    """Return the suspect's sketch and columns with the bases of the marked network's owner."""
    owner = forger.reference.tensors
    return {n: owner[n] if n.endswith("/basis") else t for n, t in forger.own.tensors.items()}


def _exact_sketch(forger: Forger, generator: Generator) -> Tensors:
    """Return the owner's reference with the sketch of the suspect's kernels."""
    tensors = dict(forger.reference.tensors)
    for name, kernel in _layers(forger):
        tensors[f"{name}/sketch"] = random_projection(kernel)
    return tensors


_COPIES: dict[str, Callable[[Forger, Generator], Tensors]] = {
    "frame, basis and sketch of the suspect": _same,
    "basis of its rows": _own_basis(lambda rows, g: rows.T),
    "basis of its signs": _own_basis(lambda rows, g: rows.T.sign()),
    "basis of its singular vectors": _own_basis(
        lambda rows, g: torch.linalg.svd(rows, full_matrices=False).Vh.T
    ),
    "basis of mixed rows": _own_basis(_random_directions),
    "with noise": _noisy,
    "sketch of another network": _foreign_sketch,
    "owner's basis": _foreign_basis,
    "owner's reference, suspect's sketch": _exact_sketch,
}
