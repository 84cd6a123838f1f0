"""Watermarking schemes behind one protocol: this package's own, and comparators.

`base` defines the protocol and `registry` finds a scheme by name. Attacks and attack runs use schemes only
through the protocol.
"""

from mtlsign.schemes.base import Detection, SchemeKey, SchemeResult, SchemeSettings, WatermarkScheme
from mtlsign.schemes.registry import SCHEMES, default_scheme, make_scheme

__all__ = [
    "SCHEMES",
    "Detection",
    "SchemeKey",
    "SchemeResult",
    "SchemeSettings",
    "WatermarkScheme",
    "default_scheme",
    "make_scheme",
]
