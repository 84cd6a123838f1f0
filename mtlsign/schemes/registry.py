"""Registry of watermarking schemes by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mtlsign.errors import SettingsError
from mtlsign.schemes.base import WatermarkScheme
from mtlsign.schemes.greedy_residuals import GreedyResidualsScheme
from mtlsign.schemes.mtlsign import MTLSignScheme
from mtlsign.schemes.neuralmark import NeuralMarkScheme
from mtlsign.schemes.uchida import UchidaScheme

#: name -> constructor, which accepts the scheme's options.
SCHEMES: dict[str, Callable[..., WatermarkScheme[Any]]] = {
    scheme.name: scheme for scheme in (MTLSignScheme, UchidaScheme, NeuralMarkScheme, GreedyResidualsScheme)
}


def make_scheme(name: str, **options: Any) -> WatermarkScheme[Any]:
    """Return a scheme by name, with its options. Raises `SettingsError` for an unknown name."""
    if name not in SCHEMES:
        raise SettingsError(f"Unknown scheme {name[:60]!r}. Use one of {', '.join(SCHEMES)}.", field="scheme")
    return SCHEMES[name](**options)


def default_scheme() -> MTLSignScheme:
    """Return this package's own scheme with its default options."""
    return MTLSignScheme()
