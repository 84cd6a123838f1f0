"""Registry of watermarking schemes by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mtlsign.errors import SettingsError
from mtlsign.schemes.adi import AdiScheme
from mtlsign.schemes.base import WatermarkScheme
from mtlsign.schemes.deepsigns import DeepSignsScheme
from mtlsign.schemes.diction import DictionScheme
from mtlsign.schemes.frontier_stitching import FrontierStitchingScheme
from mtlsign.schemes.greedy_residuals import GreedyResidualsScheme
from mtlsign.schemes.ipr_gan import IprGanScheme
from mtlsign.schemes.li2019 import Li2019Scheme
from mtlsign.schemes.mtlsign import MTLSignScheme
from mtlsign.schemes.mtlsign_presets import KeyedScheme, PaperScheme
from mtlsign.schemes.neuralmark import NeuralMarkScheme
from mtlsign.schemes.new_label import NewLabelScheme
from mtlsign.schemes.passports import PassportScheme
from mtlsign.schemes.reversible import ReversibleScheme
from mtlsign.schemes.riga import RigaScheme
from mtlsign.schemes.uchida import UchidaScheme
from mtlsign.schemes.zhang import ZhangContentScheme, ZhangNoiseScheme, ZhangUnrelatedScheme
from mtlsign.schemes.zhu2020 import Zhu2020Scheme

_SCHEMES: tuple[Any, ...] = (
    MTLSignScheme,
    KeyedScheme,
    PaperScheme,
    UchidaScheme,
    DeepSignsScheme,
    ReversibleScheme,
    RigaScheme,
    GreedyResidualsScheme,
    DictionScheme,
    NeuralMarkScheme,
    PassportScheme,
    IprGanScheme,
    ZhangContentScheme,
    ZhangNoiseScheme,
    ZhangUnrelatedScheme,
    AdiScheme,
    Li2019Scheme,
    Zhu2020Scheme,
    FrontierStitchingScheme,
    NewLabelScheme,
)
#: name -> constructor, which accepts the scheme's options.
SCHEMES: dict[str, Callable[..., WatermarkScheme[Any]]] = {scheme.name: scheme for scheme in _SCHEMES}


def make_scheme(name: str, **options: Any) -> WatermarkScheme[Any]:
    """Return a scheme by name, with its options. Raises `SettingsError` for an unknown name."""
    if name not in SCHEMES:
        raise SettingsError(f"Unknown scheme {name[:60]!r}. Use one of {', '.join(SCHEMES)}.", field="scheme")
    return SCHEMES[name](**options)


def default_scheme() -> MTLSignScheme:
    """Return this package's own scheme with its default options."""
    return MTLSignScheme()
