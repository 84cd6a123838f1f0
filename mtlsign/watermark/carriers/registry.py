"""Registry of carriers by the `kind` of the spec's `carrier` object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mtlsign.errors import ModelError
from mtlsign.models.input_spec import ImageSpec, InputSpec
from mtlsign.storage.strict_json import raise_invalid
from mtlsign.watermark.carriers.base import Carrier
from mtlsign.watermark.carriers.qr import QrCarrier
from mtlsign.watermark.carriers.words import WordCarrier
from mtlsign.watermark.keys.spec import Spec

KINDS: dict[str, type[Carrier]] = {"qr": QrCarrier, "words": WordCarrier}
#: Largest side of key images in pixels, unless the caller sets one.
MAX_DEFAULT_SIDE = 64


def parse(fields: Mapping[str, object]) -> Carrier:
    """Return the carrier of a spec's `carrier` object.

    Raises:
        KeyMaterialError: a field is missing, unknown, of the wrong type or outside its limits.
    """
    kind = fields.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise_invalid("carrier.kind", f"The value must be {' or '.join(KINDS)}")
    return KINDS[kind].parse(fields)


def for_spec(spec: Spec) -> Carrier:
    """Return the carrier of a checked spec."""
    return KINDS[spec.carrier.kind].parse(spec.carrier)


def make(kind: str, n: int, input_spec: InputSpec) -> dict[str, int | str]:
    """Return the spec's `carrier` object of one kind.

    Args:
        kind: name of a carrier in `KINDS`.
        n: key size.
        input_spec: inputs that the carrier must have; see `key_input_spec`.

    Raises:
        CarrierError: n or the inputs are outside the carrier's limits.
    """
    return KINDS[kind].make(n, input_spec)


def kind_for(input_spec: InputSpec) -> str:
    """Return the name of the carrier for a task's inputs. Raises `ModelError` if there is none."""
    kinds = {"image": "qr", "text": "words"}
    if input_spec.kind not in kinds:
        raise ModelError(
            f"No carrier has {input_spec} as inputs. Use a task of images or texts; the scheme ipr_gan marks "
            "generators.",
            field="task",
        )
    return kinds[input_spec.kind]


def key_input_spec(input_spec: InputSpec, side: int | None = None) -> InputSpec:
    """Return the inputs of the key set: the task's own, or square images for a task of images.

    Args:
        input_spec: inputs of the primary task.
        side: side of the key images in pixels; by default the task's size, or 64 if an image is larger.
    """
    if not isinstance(input_spec, ImageSpec):
        return input_spec
    if side is None and max(input_spec.height, input_spec.width) > MAX_DEFAULT_SIDE:
        side = MAX_DEFAULT_SIDE
    return input_spec if side is None else replace(input_spec, height=side, width=side)
