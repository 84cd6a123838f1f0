"""Options of schemes as text, such as `key_size=128`, checked against the scheme's own fields."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from mtlsign.errors import SettingsError
from mtlsign.schemes.base import WatermarkScheme
from mtlsign.schemes.registry import SCHEMES, make_scheme

_COUNT = Annotated[int, Field(ge=1, le=65_536)]
_NUMBER = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
_MAX_TEXT = 200


def scheme_from_texts(name: str, texts: Sequence[str], *, min_evidence_bits: float) -> WatermarkScheme[Any]:
    """Return a scheme with options given as text.

    Args:
        name: name in the registry.
        texts: options, NAME=VALUE each.
        min_evidence_bits: evidence from which a detection is accepted.

    Raises:
        SettingsError: the scheme or an option is unknown, or a value is outside its limits.
    """
    scheme = make_scheme(name, min_evidence_bits=min_evidence_bits)
    kinds = typing.get_type_hints(SCHEMES[name])
    names = [field.name for field in fields(scheme) if field.name != "min_evidence_bits"]  # type: ignore[arg-type]
    values = {}
    for text in texts:
        option, equals, value = text.partition("=")
        if not equals or option not in names or len(text) > _MAX_TEXT:
            raise SettingsError(
                f"{text[:60]!r} is no option of {name!r}. Write NAME=VALUE with one of {', '.join(names)}.",
                field="scheme-options",
            )
        values[option] = _parsed(option, kinds[option], value)
    return make_scheme(name, min_evidence_bits=min_evidence_bits, **values)


def _parsed(option: str, kind: Any, text: str) -> Any:
    limited = {int: _COUNT, int | None: _COUNT, float: _NUMBER}.get(kind, kind)
    try:
        return TypeAdapter(limited).validate_python(text)
    except ValidationError as error:
        reason = error.errors(include_url=False)[-1]["msg"]
        raise SettingsError(
            f"{option}={text[:40]} is invalid ({reason}). Correct the value.", field="scheme-options"
        ) from None
