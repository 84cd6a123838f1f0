"""Mappings from the names of a model's tensors to the names in a file.

A file can hold the tensors more than once: under several prefixes, or under the names of several libraries.
An owner's file must leave no choice (`map_names`). For a suspect's file a verifier tries every mapping
(`suspect_mappings`), because an attacker can add decoys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from mtlsign.errors import ModelError
from mtlsign.models.detectors import BODY
from mtlsign.models.families import translation_of

COUNTER = "num_batches_tracked"
#: Most mappings of one suspect that a verifier tries; each costs evidence.
MAX_MAPPINGS = 8

#: Name of the model -> name in the file.
NameMapping = dict[str, str]


def is_counter(name: str) -> bool:
    """Return whether a tensor is a batch norm's counter, which no computation depends on."""
    return name.rpartition(".")[2] == COUNTER


def map_names(names: Iterable[str], available: Iterable[str], *, optional: Iterable[str] = ()) -> NameMapping:
    """Map each name of a model to its name in an owner's file, under one common prefix that may be empty.

    The names are tried as they are, then under the only prefix that has them all (`module.`, `_orig_mod.`,
    `model.`, ...), then in the same way with the names of other libraries.

    Args:
        names: names of the model's tensors.
        available: names in the file.
        optional: names that may be missing, besides batch norm counters.

    Raises:
        ModelError: some tensors are missing (the message names up to three), or several prefixes fit.
    """
    names, required = _required(names, optional)
    own, *translated = _tables(available)
    for tables in ([own], translated):
        mappings = _complete_mappings(names, required, tables)
        unprefixed = [mapping for prefix, mapping in mappings if not prefix]
        if len(mappings) > 1 and len(unprefixed) != 1:
            shown = ", ".join(repr(prefix[:80]) for prefix, _ in mappings[:3])
            raise ModelError(
                f"The weights exist under several prefixes ({shown}). Keep one of them in the file.",
                field="checkpoint",
            )
        if mappings:
            return unprefixed[0] if unprefixed else mappings[0][1]
    raise _missing_tensors(required, [own, *translated])


def suspect_mappings(
    names: Iterable[str],
    available: Iterable[str],
    *,
    optional: Iterable[str] = (),
    tolerated: Collection[str] = (),
) -> list[NameMapping]:
    """Return every mapping of a model's names to the names in a suspect's file.

    Complete mappings stand first. A mapping without some of the tolerated names counts if it has half of them
    or, if no mapping is complete, as many as any other. The body of a detector can stand under any prefix,
    so that it is found in a classifier, too.

    Args:
        names: names of the model's tensors.
        available: names in the file; their order has no influence.
        optional: names that may be missing, besides batch norm counters.
        tolerated: required names that may be missing.

    Raises:
        ModelError: there is no mapping, or there are more than `MAX_MAPPINGS`.
    """
    names = list(names)
    if names and all(name.startswith(f"{BODY}.") for name in names):
        inner = suspect_mappings(
            map(_in_body, names), available,
            optional=map(_in_body, optional), tolerated=set(map(_in_body, tolerated)),
        )  # fmt: skip
        return [{f"{BODY}.{name}": source for name, source in mapping.items()} for mapping in inner]
    names, required = _required(names, optional)
    tables = _tables(available)
    distinct: dict[tuple[str, ...], NameMapping] = {}
    for _, mapping in _complete_mappings(names, required, tables):
        distinct.setdefault(tuple(sorted(mapping.values())), mapping)
    complete = [set(sources) for sources in distinct]
    for mapping in _partial_mappings(names, required, tables, tolerated, minimum=not complete):
        if not any(set(mapping.values()) <= sources for sources in complete):
            distinct.setdefault(tuple(sorted(mapping.values())), mapping)
    if len(distinct) > MAX_MAPPINGS:
        raise ModelError(
            f"The weights exist in over {MAX_MAPPINGS} places of the file. Keep one of them.",
            field="checkpoint",
        )
    if not distinct:
        raise _missing_tensors(required, tables)
    return list(distinct.values())


def _in_body(name: str) -> str:
    """Return the name of a tensor of a detector's body without the name of the body."""
    return name.removeprefix(f"{BODY}.")


def names_in_any_network(names: Iterable[str]) -> set[str]:
    """Return names of a network's tensors, and those of a detector's body without the name of the body."""
    return {own for name in names for own in (name, _in_body(name))}


def _required(names: Iterable[str], optional: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the distinct names, and those of them that a complete mapping has."""
    distinct, omissible = list(dict.fromkeys(names)), set(optional)
    return distinct, [name for name in distinct if name not in omissible and not is_counter(name)]


def _tables(available: Iterable[str]) -> list[dict[str, str]]:
    """Return tables from a name to its name in the file: the file's own names, then each other spelling.

    Each spelling translates no two names alike, so that no table depends on an order.
    """
    sources = sorted({name for name in available if isinstance(name, str)})
    translations = [(source, t) for source in sources if (t := translation_of(source)) is not None]
    spellings = sorted({t.spelling for _, t in translations if t.spelling is not None})
    return [
        {source: source for source in sources},
        *(
            {t.target: source for source, t in translations if t.spelling in (spelling, None)}
            for spelling in spellings
        ),
    ]


def _complete_mappings(
    names: Sequence[str], required: Sequence[str], tables: Sequence[Mapping[str, str]]
) -> list[tuple[str, NameMapping]]:
    """Return the distinct mappings with all required names, each with its prefix."""
    mappings: list[tuple[str, NameMapping]] = []
    for table in tables:
        for prefix in sorted(_complete_prefixes(required, table)):
            mapping = {name: table[prefix + name] for name in names if prefix + name in table}
            if all(mapping != other for _, other in mappings):
                mappings.append((prefix, mapping))
    return mappings


def _complete_prefixes(required: Sequence[str], table: Mapping[str, str]) -> set[str]:
    """Return the prefixes under which all required names exist; a prefix ends with no word character."""
    if not required:
        return {""}
    longest = max(required, key=len)
    starts = {name[: -len(longest)] for name in table if name.endswith(longest)}
    return {
        prefix
        for prefix in starts
        if _is_prefix(prefix[-1:]) and all(prefix + name in table for name in required)
    }


def _partial_mappings(
    names: Sequence[str],
    required: Sequence[str],
    tables: Sequence[Mapping[str, str]],
    tolerated: Collection[str],
    *,
    minimum: bool,
) -> Iterator[NameMapping]:
    """Yield the mappings with half of the tolerated names.

    Args:
        names: names of the model's tensors.
        required: names of a complete mapping.
        tables: see `_tables`.
        tolerated: required names that may be missing.
        minimum: whether the mappings with most of the tolerated names count even if they have fewer.
    """
    if not tolerated:
        return
    targets, strict = set(required), [name for name in required if name not in tolerated]
    longest = max(map(len, required), default=0)
    for table in tables:
        counts = Counter(prefix for name in table for prefix in _prefixes_of(name, targets, longest))
        eligible = [p for p in sorted(counts) if all(p + name in table for name in strict)]
        most = max((counts[prefix] for prefix in eligible), default=0)
        bound = min(most, len(required) / 2) if minimum else len(required) / 2
        for prefix in eligible:
            if bound <= counts[prefix] < len(required):
                yield {name: table[prefix + name] for name in names if prefix + name in table}


def is_name_of(source: str, targets: Collection[str]) -> bool:
    """Return whether a name in a file is one of a model's names, after any prefix."""
    starts = range(max(0, len(source) - 300), len(source))
    return any(source[i:] in targets and _is_prefix(source[i - 1 : i] if i else "") for i in starts)


def _prefixes_of(name: str, targets: Collection[str], longest: int) -> Iterator[str]:
    """Yield the prefixes, empty or ending with no word character, after which a target name follows.

    Args:
        name: a name in the file.
        targets: names of the model.
        longest: number of characters of the longest target name.
    """
    for start in range(max(0, len(name) - longest), len(name)):
        if _is_prefix(name[start - 1 : start]) and name[start:] in targets:
            yield name[:start]


def _is_prefix(end: str) -> bool:
    """Return whether a prefix with this last character, or an empty one, can precede a name."""
    return not (end.isalnum() or end == "_")


def _missing_tensors(required: Sequence[str], tables: Sequence[Mapping[str, str]]) -> ModelError:
    """Return the error that names up to three missing tensors under the best prefix of any table."""
    missing = min((_missing(required, table) for table in tables), key=len)
    shown = ", ".join(name[:80] for name in missing[:3])
    return ModelError(
        f"{len(missing)} of {len(required)} tensors are missing, such as {shown}. Give a checkpoint of "
        "this architecture, or another --model.",
        field="checkpoint",
    )


def _missing(required: Sequence[str], table: Mapping[str, str]) -> list[str]:
    """Return the names missing under the best prefix that the first names suggest."""
    starts = {""}
    for name in required[:3]:
        starts |= {source[: -len(name)] for source in table if source.endswith("." + name)}
    results = [[name for name in required if p + name not in table] for p in sorted(starts, key=len)[:20]]
    return min(results, key=len)
