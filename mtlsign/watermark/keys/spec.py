"""Spec: every choice of the claimant, as the owner's exact UTF-8 JSON bytes (docs/decisions/0001).

The bytes are hashed into the key unchanged and never serialised again. Content that two readers may
understand differently is refused: floats, duplicate or unknown fields, large integers. The format is in
`docs/format.md`, section "Spec".

The fields of carriers are parsed here and not in `mtlsign.watermark.carriers`, because a key exists
only for a spec that is valid as a whole, and carriers depend on keys.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from mtlsign.errors import KeyMaterialError
from mtlsign.storage.strict_json import parse_strict_json, raise_invalid, require_fields, require_hex
from mtlsign.storage.versions import EMBED_AGAIN, refuse_version_0

FORMAT = "mtlsign/v1"
MAX_SPEC_BYTES = 16 * 1024
MIN_N, MAX_N = 128, 4096
MODULES_PER_SIDE = 21
FIELDS = (
    *("format", "name", "nonce", "n", "readouts", "carrier", "taps"),
    *("head", "statistic", "normalise", "architecture", "reference"),
)

_TAP = re.compile(r"[A-Za-z0-9_.]{1,200}")
_ARCH = re.compile(r"[A-Za-z0-9_/.:-]{1,128}")
_ARCHITECTURE_FIELD = re.compile(r"[a-z][a-z0-9_]{0,31}")
# No controls, surrogates, invisible or direction-changing characters. The list is fixed, because Unicode's
# tables change.
_TEXT = re.compile(
    "[^\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    "\ufdd0-\ufdef\ufeff\ufff0-\ufffb\ufffe\uffff\U000e0000-\U000e0fff]{1,128}"
)


@dataclass(frozen=True, slots=True)
class QrCarrierSpec:
    """Fields of the QR carrier: symbol, geometry in pixels, normalisation in thousandths."""

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
class WordCarrierSpec:
    """Fields of the word carrier: how many words there are, digits of an integer, words of a sequence."""

    kind: str
    base: int
    digits: int
    length: int


CarrierSpec = QrCarrierSpec | WordCarrierSpec


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """Fields of the head: `spread` or `keyed` (from the key), or `free` (trained) with units and features."""

    kind: str
    hidden: int | None = None
    features: str | None = None


@dataclass(frozen=True, slots=True)
class ReadoutSpec:
    """Read-out: its head, taps and number of bits."""

    head: HeadSpec
    taps: tuple[str, ...]
    n: int


@dataclass(frozen=True, slots=True)
class Spec:
    """Checked spec. `raw` holds the owner's bytes; `repr` hides them and the nonce."""

    format: str
    name: str
    nonce: str = field(repr=False)
    n: int
    further_readouts: tuple[ReadoutSpec, ...]
    carrier: CarrierSpec
    taps: tuple[str, ...]
    head: HeadSpec
    statistic: str
    normalise: str
    architecture_fields: tuple[tuple[str, int | str], ...]
    reference: str
    raw: bytes = field(repr=False)

    @property
    def readouts(self) -> tuple[ReadoutSpec, ...]:
        """All read-outs: that of `head`, `taps` and `n`, then the further ones."""
        return ReadoutSpec(self.head, self.taps, self.n), *self.further_readouts

    @property
    def total_bits(self) -> int:
        """Bits of all read-outs together."""
        return sum(readout.n for readout in self.readouts)

    @property
    def has_trained_head(self) -> bool:
        """True if a head is trained, so that a match is evidence only with an earlier commitment."""
        return any(readout.head.kind == "free" for readout in self.readouts)

    @property
    def architecture(self) -> dict[str, int | str]:
        """Committed architecture: `arch` with its integers and words, as a new dict."""
        return dict(self.architecture_fields)


def m_bits(n: int) -> int:
    """Return the width of the integers in bits, m = 3·⌈log2 n⌉ (paper, Appendix A)."""
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    return 3 * (n - 1).bit_length()


def decimal_digits(n: int) -> int:
    """Return the decimal digits of 2^m for a key of n integers: 10 for n = 600 and n = 1,024."""
    return len(str(1 << m_bits(n)))


def digit_count(n: int, base: int) -> int:
    """Return the fewest digits in `base` that hold every integer below 2^m for a key of n integers."""
    digits = 1
    while base**digits < 1 << m_bits(n):
        digits += 1
    return digits


def _integer(fields: Mapping[str, object], name: str, low: int, high: int, where: str) -> int:
    value = fields[name]
    if type(value) is not int or not low <= value <= high:  # bool is an int to isinstance
        raise_invalid(f"{where}.{name}", f"The value must be an integer from {low} to {high}")
    return value


def plain_text(value: object, where: str) -> str:
    """Return `value` if it is a plain name or remark: 1 to 128 code points of the format's *text*.

    Raises:
        KeyMaterialError: it holds a control, an invisible or a direction-changing character, or is no text.
    """
    return _text(value, where, _TEXT)


def _text(value: object, where: str, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise_invalid(
            where, "The value must be a string of the length and characters that the format allows here"
        )
    return value


def _choice(fields: Mapping[str, object], name: str, where: str, *choices: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or value not in choices:
        raise_invalid(f"{where}.{name}", f"The value must be {' or '.join(choices)}")
    return value


def parse_carrier(value: object) -> CarrierSpec:
    """Check the spec's `carrier` object as far as possible without n.

    Raises:
        KeyMaterialError: a field is missing, unknown, of the wrong type or outside its limits.
    """
    at = "carrier"
    if isinstance(value, dict) and value.get("kind") == "words":
        fields = require_fields(value, at, *WordCarrierSpec.__dataclass_fields__)
        base, length = _integer(fields, "base", 2, 2**16, at), _integer(fields, "length", 1, 1024, at)
        return WordCarrierSpec("words", base, _integer(fields, "digits", 1, min(length, 48), at), length)
    fields = require_fields(value, at, *QrCarrierSpec.__dataclass_fields__)
    height = _integer(fields, "height", MODULES_PER_SIDE, 1024, at)
    width = _integer(fields, "width", MODULES_PER_SIDE, 1024, at)
    return QrCarrierSpec(
        kind=_choice(fields, "kind", at, "qr", "words"),
        version=_integer(fields, "version", 1, 1, at),
        level=_choice(fields, "level", at, "H"),
        mode=_choice(fields, "mode", at, "numeric"),
        mask=_integer(fields, "mask", 0, 0, at),
        digits=_integer(fields, "digits", 1, 17, at),
        channels=_integer(fields, "channels", 1, 16, at),
        height=height,
        width=width,
        module=_integer(fields, "module", 1, min(height, width) // MODULES_PER_SIDE, at),
        pad=_integer(fields, "pad", 0, 1, at),
        mean_milli=_integer(fields, "mean_milli", -1_000_000, 1_000_000, at),
        std_milli=_integer(fields, "std_milli", 1, 1_000_000, at),
    )


def _head(value: object) -> HeadSpec:
    if isinstance(value, dict) and value.get("kind") == "free":
        fields = require_fields(value, "head", "kind", "hidden", "features")
        hidden = _integer(fields, "hidden", 1, 1024, "head")
        return HeadSpec("free", hidden, _choice(fields, "features", "head", "flat", "pooled"))
    return HeadSpec(_choice(require_fields(value, "head", "kind"), "kind", "head", "keyed", "spread"))


def _further_readouts(value: object, n: int) -> tuple[ReadoutSpec, ...]:
    """Check `readouts`: 1, or a list of 1 to 3 further read-outs, none of them trained."""
    if type(value) is int and value == 1:
        return ()
    if not isinstance(value, list) or not 1 <= len(value) <= 3:
        raise_invalid("spec.readouts", "The value must be 1 or a list of 1 to 3 read-outs")
    readouts = []
    for item in value:
        fields = require_fields(item, "spec.readouts", "head", "taps", "n")
        head = _head(fields["head"])
        if head.kind == "free":
            raise_invalid("spec.readouts", "A further read-out must have a head from the key")
        bits = _integer(fields, "n", MIN_N, MAX_N if head.kind == "spread" else n, "spec.readouts")
        readouts.append(ReadoutSpec(head, _taps(fields["taps"]), bits))
    return tuple(readouts)


def _taps(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= 16:
        raise_invalid("taps", "The taps must be a list of 1 to 16 module names")
    taps = tuple(_text(tap, "taps", _TAP) for tap in value)
    if len(set(taps)) != len(taps):
        raise_invalid("taps", "The list names a module twice")
    return taps


def _architecture(value: object) -> tuple[tuple[str, int | str], ...]:
    if not isinstance(value, dict) or "arch" not in value or len(value) > 32:
        raise_invalid("architecture", "The value must be an object of at most 32 fields, one of them arch")
    _text(value["arch"], "architecture.arch", _ARCH)
    fields: list[tuple[str, int | str]] = []
    for name, item in value.items():
        _text(name, "architecture", _ARCHITECTURE_FIELD)
        if type(item) is int:
            fields.append((name, item))
        else:
            fields.append((name, _text(item, f"architecture.{name}", _TEXT)))
    return tuple(fields)


def _check_capacity(carrier: CarrierSpec, n: int) -> None:
    """Raise `KeyMaterialError` unless the carrier has exactly the digits that integers for n need."""
    digits = decimal_digits(n) if isinstance(carrier, QrCarrierSpec) else digit_count(n, carrier.base)
    if carrier.digits != digits:
        raise_invalid("carrier.digits", f"The number of digits must be {digits} for n = {n}")


def parse_spec(data: bytes) -> Spec:
    """Read a spec's exact bytes (at most 16 KiB).

    Raises:
        KeyMaterialError: the bytes are not one well-formed spec of version 1; nothing else is ever raised.
    """
    document = parse_strict_json(data, limit=MAX_SPEC_BYTES, where="spec")
    refuse_version_0(document, "format", where="spec", fix=EMBED_AGAIN)
    fields = require_fields(document, "spec", *FIELDS)
    n = _integer(fields, "n", MIN_N, MAX_N, "spec")
    carrier = parse_carrier(fields["carrier"])
    _check_capacity(carrier, n)
    return Spec(
        format=_choice(fields, "format", "spec", FORMAT),
        name=_text(fields["name"], "spec.name", _TEXT),
        nonce=require_hex(fields["nonce"], "spec.nonce", 32).hex(),
        n=n,
        further_readouts=_further_readouts(fields["readouts"], n),
        carrier=carrier,
        taps=_taps(fields["taps"]),
        head=_head(fields["head"]),
        statistic=_choice(fields, "statistic", "spec", "count", "weighted"),
        normalise=_choice(fields, "normalise", "spec", "key-batch"),
        architecture_fields=_architecture(fields["architecture"]),
        reference=require_hex(fields["reference"], "spec.reference", 32).hex(),
        raw=bytes(data),
    )


def make_spec(**fields: object) -> bytes:
    """Write a spec: `name, n, carrier, taps, head, statistic, architecture, reference`.

    `format`, `readouts`, `normalise` and a new random `nonce` (64 hex digits) are filled in if absent.

    Raises:
        KeyMaterialError: `parse_spec` would refuse the result.
    """
    values: dict[str, object] = {"format": FORMAT, "readouts": 1, "normalise": "key-batch"} | fields
    values.setdefault("nonce", secrets.token_hex(32))
    ordered = {name: values[name] for name in FIELDS if name in values} | values
    try:
        text = json.dumps(ordered, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        data = text.encode("utf-8")
    except (TypeError, ValueError, RecursionError):
        raise KeyMaterialError(
            "The spec holds a value that JSON cannot hold. Pass strings, integers, lists and dicts.",
            field="spec",
        ) from None
    return parse_spec(data).raw
