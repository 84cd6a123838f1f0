"""Carriers of the watermark: data-space representations of the key's integers (paper §3.2).

`carriers.for_spec(spec)` returns the carrier of a spec; `carriers.make(kind, n, input_spec)` creates one.
"""

from mtlsign.watermark.carriers.base import Carrier
from mtlsign.watermark.carriers.registry import for_spec, key_input_spec, kind_for, make, parse

__all__ = ["Carrier", "for_spec", "key_input_spec", "kind_for", "make", "parse"]
