"""Mapping from names of plain weights to the tensors of a file, some of which are computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from mtlsign.models.derived_weights.companions import Companions, as_float32
from mtlsign.models.derived_weights.forms import FORMS, WEIGHT, Form
from mtlsign.models.derived_weights.scaled import as_numbers

#: Reading of a name as the tensor that the file has under it; the other readings are indices of `FORMS`.
_STORED = -1

#: Name of a plain weight -> its readings, in the order of `FORMS`.
_Readings = Mapping[str, tuple[int, ...]]


class DerivedWeights(Mapping[str, Tensor]):
    """Tensors of a file under the names of plain weights: quantised and reparametrised kernels are computed.

    Forms are recognised by names alone, and no tensor is read before its access. The companions of a
    recognised kernel have no name here. A kernel is computed at each access, as float32 on the CPU. Other
    tensors are unchanged, except that int8 and float8 become float32.

    An attacker can store a layer in several forms, of which all but one are decoys. This view reads the
    tensor that the file has under the plain name; `alternatives` returns the other views as well.

    Args:
        tensors: the file. It may be lazy, and its order has no influence.

    Raises:
        ModelError: at an access, if the companions fit no rule.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._stored = {name for name in tensors if isinstance(name, str)}
        self._readings, companions = _recognised(self._stored)
        self._names = sorted((self._stored - companions) | self._readings.keys())
        self._members = frozenset(self._names)
        self._chosen: Mapping[str, int] = _choices(self._readings, preferred=_STORED)

    def alternatives(self) -> Sequence[DerivedWeights]:
        """Return the views that differ in the reading of at least one name; this one is the first.

        One view prefers the tensor under the plain name. Each other view prefers one form, then the other
        forms, then the tensor under the plain name. There is at most one view more than there are forms. They
        may differ in names that a caller does not read, so the caller counts and bounds the ones that matter
        to it (`form_of`).
        """
        ambiguous = {
            reading for readings in self._readings.values() if len(readings) > 1 for reading in readings
        }
        distinct: dict[tuple[int, ...], Mapping[str, int]] = {}
        for preferred in (_STORED, *sorted(ambiguous)):
            chosen = _choices(self._readings, preferred)
            distinct.setdefault(tuple(chosen[name] for name in sorted(chosen)), chosen)
        return [self._view(chosen) for chosen in distinct.values()]

    def form_of(self, name: str) -> int:
        """Return the index of the form in which this view reads a name; two views may differ in it."""
        return self._chosen.get(name, _STORED)

    def _view(self, chosen: Mapping[str, int]) -> DerivedWeights:
        view = object.__new__(DerivedWeights)
        view.__dict__.update(self.__dict__)
        view._chosen = chosen
        return view

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        reading = self._chosen.get(name, _STORED)
        if reading == _STORED:
            return as_numbers(self._tensors[name])
        companions = Companions(self._tensors, self._stored, name[: -len(WEIGHT)])
        return as_float32(FORMS[reading].compute(companions))

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _recognised(stored: set[str]) -> tuple[_Readings, set[str]]:
    """Return the readings of each kernel that has a form, and the names of all companions."""
    readings: dict[str, tuple[int, ...]] = {}
    companions: set[str] = set()
    for index, form in enumerate(FORMS):
        for prefix in _prefixes(form, stored):
            name = prefix + WEIGHT
            earlier = readings.get(name, (_STORED,) if name in stored else ())
            readings[name] = (*earlier, index)
            companions.update(prefix + suffix for suffix in (*form.required, *form.optional))
    return readings, companions


def _prefixes(form: Form, stored: set[str]) -> Iterator[str]:
    """Yield the prefixes, empty or ending with a dot, under which all companions of a form exist."""
    marker = form.marker
    for name in stored:
        if name.endswith(marker):
            prefix = name[: -len(marker)]
            if prefix[-1:] in ("", ".") and all(prefix + suffix in stored for suffix in form.required):
                yield prefix


def _choices(readings: _Readings, preferred: int) -> dict[str, int]:
    """Return one reading for each name: the preferred one, else the first form, else the stored tensor."""
    return {
        name: preferred if preferred in options else next((o for o in options if o != _STORED), _STORED)
        for name, options in readings.items()
    }
