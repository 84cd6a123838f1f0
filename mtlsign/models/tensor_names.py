"""Mapping from the names of a model's tensors to the names in a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from mtlsign.errors import ModelError
from mtlsign.models.families import translated_tensor_name

MAX_NAME = 512
COUNTER = "num_batches_tracked"


def is_counter(name: str) -> bool:
    """Return whether a tensor is a batch norm's counter, which no computation depends on."""
    return name.rpartition(".")[2] == COUNTER


def map_names(
    names: Iterable[str],
    available: Iterable[str],
    *,
    optional: Iterable[str] = (),
    strict: bool = False,
    tolerated: Collection[str] = (),
) -> dict[str, str]:
    """Map each name of a model to its name in a file, under one common prefix that may be empty.

    The names are tried as they are, then under the only prefix that has them all (`module.`, `_orig_mod.`,
    `model.`, ...), then in the same way with the names of other libraries.

    Args:
        names: names of the model's tensors.
        available: names in the file.
        optional: names that may be missing, besides batch norm counters.
        strict: treat the empty prefix like any other one. Verifiers do, because an attacker's file may hold
            decoys besides the real weights.
        tolerated: names that may be missing if no prefix has them all. The prefix with most of them is taken.

    Returns:
        name of the model -> name in the file.

    Raises:
        ModelError: some tensors are missing (the message names up to three), or several prefixes fit.
    """
    names, optional = list(dict.fromkeys(names)), set(optional)
    required = [n for n in names if n not in optional and not is_counter(n)]
    sources = [n for n in dict.fromkeys(available) if isinstance(n, str) and len(n) <= MAX_NAME]
    translated: dict[str, str] = {}
    for source in sources:
        translated.setdefault(translated_tensor_name(source) or source, source)
    nearest: tuple[int, list[str]] = (-1, required)
    tables: list[Mapping[str, str]] = []
    for table in ({source: source for source in sources}, translated):
        prefixes = _prefixes(required, table)
        if len(prefixes) > 1 and (strict or "" not in prefixes):
            shown = ", ".join(repr(p[:80]) for p in sorted(prefixes)[:3])
            raise ModelError(
                f"The weights exist under several prefixes ({shown}). Keep one of them in the file.",
                field="checkpoint",
            )
        if prefixes:
            prefix = "" if "" in prefixes else next(iter(prefixes))
            return {name: table[prefix + name] for name in names if prefix + name in table}
        nearest = max(nearest, _nearest(required, table), key=lambda candidate: candidate[0])
        tables.append(table)
    partial = _partial_mapping(names, required, tables, tolerated)
    if partial:
        return partial
    shown = ", ".join(name[:80] for name in nearest[1][:3])
    raise ModelError(
        f"{len(nearest[1])} of {len(required)} tensors are missing, such as {shown}. Give a checkpoint of "
        "this architecture, or another --model.",
        field="checkpoint",
    )


def _partial_mapping(
    names: Sequence[str],
    required: Sequence[str],
    tables: Sequence[Mapping[str, str]],
    tolerated: Collection[str],
) -> dict[str, str]:
    """Return the mapping under the prefix with most of the tolerated names; empty if there is none.

    Raises:
        ModelError: several prefixes have equally many, and their tensors differ.
    """
    if not tolerated:
        return {}
    targets, strict = set(required), [name for name in required if name not in tolerated]
    dots = max((name.count(".") for name in required), default=0)
    candidates: dict[tuple[str, ...], tuple[int, dict[str, str]]] = {}
    for table in tables:
        counts = Counter(prefix for name in table for prefix in _prefixes_of(name, targets, dots))
        most = max(counts.values(), default=0)
        for prefix in sorted(prefix for prefix, count in counts.items() if count == most):
            mapping = {name: table[prefix + name] for name in names if prefix + name in table}
            if all(name in mapping for name in strict):
                candidates[tuple(sorted(mapping.values()))] = most, mapping
            if len(candidates) > 2:
                break
    most = max((count for count, _ in candidates.values()), default=0)
    best = [mapping for count, mapping in candidates.values() if count == most]
    if len(best) > 1:
        raise ModelError(
            "Parts of the weights exist under several prefixes. Keep one of them in the file.",
            field="checkpoint",
        )
    return best[0] if best else {}


def _prefixes_of(name: str, targets: Collection[str], dots: int) -> Iterator[str]:
    """Yield the prefixes, empty or ending with a dot, after which one of the target names follows.

    Args:
        name: a name in the file.
        targets: names of the model.
        dots: largest number of dots in a target name.
    """
    parts = name.split(".")
    for index in range(max(0, len(parts) - 1 - dots), len(parts)):
        suffix = ".".join(parts[index:])
        if suffix in targets:
            yield name[: len(name) - len(suffix)]


def _prefixes(required: Sequence[str], table: Mapping[str, str]) -> set[str]:
    if not required:
        return {""}
    longest = max(required, key=len)
    starts = {name[: -len(longest)] for name in table if name.endswith(longest)}
    return {p for p in starts if (not p or p.endswith(".")) and all(p + name in table for name in required)}


def _nearest(required: Sequence[str], table: Mapping[str, str]) -> tuple[int, list[str]]:
    """Return (tensors present, names missing) under the best prefix that the first names suggest."""
    starts = {""}
    for name in required[:3]:
        starts |= {n[: -len(name)] for n in table if n.endswith("." + name)}
    results = [[name for name in required if p + name not in table] for p in sorted(starts, key=len)[:20]]
    missing = min(results, key=len)
    return len(required) - len(missing), missing
