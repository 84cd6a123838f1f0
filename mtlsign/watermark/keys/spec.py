"""The spec: everything the claimant chooses, as the owner's exact UTF-8 JSON bytes (design decision 2).

The bytes are hashed into the key as they are and never re-serialised; whatever two readers might understand
differently is refused: floats, duplicate or unknown fields, odd numbers.
Written format: `docs/format.md`, section "Spec".
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from mtlsign.errors import KeyMaterialError
from mtlsign.storage.strict_json import parse_strict_json, raise_invalid, require_fields, require_hex

FORMAT = "mtlsign/v0"
MAX_SPEC_BYTES = 16 * 1024
MIN_N, MAX_N = 128, 4096
MODULES_PER_SIDE = 21
FIELDS = (
    *("format", "name", "nonce", "n", "readouts", "carrier", "taps"),
    *("head", "statistic", "normalise", "graph", "reference"),
)

_TAP = re.compile(r"[A-Za-z0-9_.]{1,200}")
_ARCH = re.compile(r"[A-Za-z0-9_/.:-]{1,128}")
_GRAPH_FIELD = re.compile(r"[a-z][a-z0-9_]{0,31}")
# No controls, surrogates, invisible or direction-changing characters: a fixed list, Unicode's tables change.
_TEXT = re.compile(
    "[^\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    "\ufdd0-\ufdef\ufeff\ufff0-\ufffb\ufffe\uffff\U000e0000-\U000e0fff]{1,128}"
)


@dataclass(frozen=True, slots=True)
class Carrier:
    """How an integer becomes an image: QR symbol, geometry in pixels, normalisation in thousandths."""

    kind: str
    version: int
    level: str
    mode: str
    mask: int
    digits: int
    channels: int
    height: int
    width: int
    module: int
    pad: int
    mean_milli: int
    std_milli: int


@dataclass(frozen=True, slots=True)
class Head:
    """`keyed` (derived from the key), or `free` (trained): its hidden width, `flat` or `pooled` features."""

    kind: str
    hidden: int | None = None
    features: str | None = None


@dataclass(frozen=True, slots=True)
class Spec:
    """A checked spec. `raw` are the owner's bytes; the nonce and they stay out of every repr."""

    format: str
    name: str
    nonce: str = field(repr=False)
    n: int
    readouts: int
    carrier: Carrier
    taps: tuple[str, ...]
    head: Head
    statistic: str
    normalise: str
    graph_fields: tuple[tuple[str, int | str], ...]
    reference: str
    raw: bytes = field(repr=False)

    @property
    def graph(self) -> dict[str, int | str]:
        """The committed architecture: `arch` and its integers and words (a fresh dict)."""
        return dict(self.graph_fields)


def m_bits(n: int) -> int:
    """The integers' width m = 3·⌈log2 n⌉ (paper, Appendix A)."""
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    return 3 * (n - 1).bit_length()


def decimal_digits(n: int) -> int:
    """Digits of 2^m for a key of n integers: 10 for n = 600 and n = 1,024."""
    return len(str(1 << m_bits(n)))


def _integer(fields: Mapping[str, object], name: str, low: int, high: int, where: str) -> int:
    value = fields[name]
    if type(value) is not int or not low <= value <= high:  # bool is an int to isinstance
        raise_invalid(f"{where}.{name}", f"must be an integer from {low} to {high}")
    return value


def plain_text(value: object, where: str) -> str:
    """`value` as a name or remark that shows what it says: 1 to 128 code points of the format's *text*.

    Raises:
        KeyMaterialError: it holds a control, an invisible or a direction-changing character, or is no text.
    """
    return _text(value, where, _TEXT)


def _text(value: object, where: str, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise_invalid(where, "must be a string of the length and characters that docs/format.md allows here")
    return value


def _choice(fields: Mapping[str, object], name: str, where: str, *choices: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or value not in choices:
        raise_invalid(f"{where}.{name}", f"must be {' or '.join(choices)}")
    return value


def parse_carrier(value: object) -> Carrier:
    """The spec's `carrier` object, checked as far as it goes without n.

    Raises:
        KeyMaterialError: a field is missing, unknown, of the wrong type or outside its limits.
    """
    at = "carrier"
    got = require_fields(value, at, *Carrier.__dataclass_fields__)
    height = _integer(got, "height", MODULES_PER_SIDE, 1024, at)
    width = _integer(got, "width", MODULES_PER_SIDE, 1024, at)
    return Carrier(
        kind=_choice(got, "kind", at, "qr"),
        version=_integer(got, "version", 1, 1, at),
        level=_choice(got, "level", at, "H"),
        mode=_choice(got, "mode", at, "numeric"),
        mask=_integer(got, "mask", 0, 0, at),
        digits=_integer(got, "digits", 1, 17, at),
        channels=_integer(got, "channels", 1, 16, at),
        height=height,
        width=width,
        module=_integer(got, "module", 1, min(height, width) // MODULES_PER_SIDE, at),
        pad=_integer(got, "pad", 0, 1, at),
        mean_milli=_integer(got, "mean_milli", -1_000_000, 1_000_000, at),
        std_milli=_integer(got, "std_milli", 1, 1_000_000, at),
    )


def _head(value: object) -> Head:
    if isinstance(value, dict) and value.get("kind") == "free":
        got = require_fields(value, "head", "kind", "hidden", "features")
        hidden = _integer(got, "hidden", 1, 1024, "head")
        return Head("free", hidden, _choice(got, "features", "head", "flat", "pooled"))
    return Head(_choice(require_fields(value, "head", "kind"), "kind", "head", "keyed"))


def _taps(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= 16:
        raise_invalid("taps", "must be a list of 1 to 16 module names")
    taps = tuple(_text(tap, "taps", _TAP) for tap in value)
    if len(set(taps)) != len(taps):
        raise_invalid("taps", "names a module twice")
    return taps


def _graph(value: object) -> tuple[tuple[str, int | str], ...]:
    if not isinstance(value, dict) or "arch" not in value or len(value) > 32:
        raise_invalid("graph", "must be an object of at most 32 fields, among them arch")
    _text(value["arch"], "graph.arch", _ARCH)
    found: list[tuple[str, int | str]] = []
    for name, item in value.items():
        _text(name, "graph", _GRAPH_FIELD)
        if type(item) is int:
            found.append((name, item))
        else:
            found.append((name, _text(item, f"graph.{name}", _TEXT)))
    return tuple(found)


def parse_spec(data: bytes) -> Spec:
    """Read a spec's exact bytes (at most 16 KiB).

    Raises:
        KeyMaterialError: the bytes are not one well-formed v0 spec; nothing else is ever raised.
    """
    got = require_fields(parse_strict_json(data, limit=MAX_SPEC_BYTES, where="spec"), "spec", *FIELDS)
    n = _integer(got, "n", MIN_N, MAX_N, "spec")
    carrier = parse_carrier(got["carrier"])
    if carrier.digits != decimal_digits(n):
        raise_invalid("carrier.digits", f"must be {decimal_digits(n)} for n = {n}")
    return Spec(
        format=_choice(got, "format", "spec", FORMAT),
        name=_text(got["name"], "spec.name", _TEXT),
        nonce=require_hex(got["nonce"], "spec.nonce", 32).hex(),
        n=n,
        readouts=_integer(got, "readouts", 1, 1, "spec"),
        carrier=carrier,
        taps=_taps(got["taps"]),
        head=_head(got["head"]),
        statistic=_choice(got, "statistic", "spec", "count", "weighted"),
        normalise=_choice(got, "normalise", "spec", "key-batch"),
        graph_fields=_graph(got["graph"]),
        reference=require_hex(got["reference"], "spec.reference", 32).hex(),
        raw=bytes(data),
    )


def make_spec(**fields: object) -> bytes:
    """Write a spec: `name, n, carrier, taps, head, statistic, graph, reference`.

    `format`, `readouts`, `normalise` and a fresh random `nonce` (64 hex digits) are filled in when left out.

    Raises:
        KeyMaterialError: `parse_spec` would refuse the result.
    """
    given: dict[str, object] = {"format": FORMAT, "readouts": 1, "normalise": "key-batch"} | fields
    given.setdefault("nonce", secrets.token_hex(32))
    ordered = {name: given[name] for name in FIELDS if name in given} | given
    try:
        text = json.dumps(ordered, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        data = text.encode("utf-8")
    except (TypeError, ValueError, RecursionError):
        raise KeyMaterialError(
            "holds something JSON cannot say; pass strings, integers, lists and dicts", field="spec"
        ) from None
    return parse_spec(data).raw
