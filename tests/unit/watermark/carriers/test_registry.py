"""Tests of the registry of carriers."""

from __future__ import annotations

import pytest
import torch

from mtlsign.errors import CarrierError, KeyMaterialError
from mtlsign.models.input_spec import ImageSpec
from mtlsign.watermark import carriers
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.keys.opening import watermark_integers
from mtlsign.watermark.keys.spec import parse_spec
from tests.unit.watermark.keys.examples import SPEC

IMAGES = ImageSpec(1, 28, 30, 10)


def test_for_spec_returns_carrier_with_inputs_of_the_spec() -> None:
    spec = parse_spec(SPEC)
    carrier, integers = carriers.for_spec(spec), watermark_integers(bytes(32), 5)
    inputs = carrier.inputs(integers)
    assert inputs.shape == (5, *carrier.element_shape) == (5, 1, 28, 28)
    assert carrier.number_count(5) == inputs.numel()
    assert torch.equal(inputs, qr.images(integers, spec.carrier))


def test_make_equals_carrier_of_the_kind() -> None:
    fields = carriers.make(carriers.kind_for(IMAGES), 600, IMAGES)
    assert fields == qr.make_carrier(600, 1, 28, 30)


def test_parse_refuses_unknown_kind() -> None:
    fields = qr.make_carrier(600, 1, 28, 28)
    assert carriers.parse(fields).element_shape == (1, 28, 28)
    for kind in ("text", ["qr"], None):
        with pytest.raises(KeyMaterialError, match=r"carrier\.kind"):
            carriers.parse(fields | {"kind": kind})


def test_check_refuses_key_set_over_four_gib() -> None:
    fields = qr.make_carrier(1024, 3, 1024, 1024)
    carrier = qr.QrCarrier.parse(fields)
    carrier.check(100)
    with pytest.raises(CarrierError, match="4 GiB"):
        carrier.check(1024)


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((28, 30), None, (28, 30)),
        ((28, 30), 40, (40, 40)),
        ((224, 200), None, (64, 64)),
        ((64, 64), None, (64, 64)),
    ],
)
def test_key_input_spec_limits_images_to_64_pixels_by_default(
    size: tuple[int, int], side: int | None, expected: tuple[int, int]
) -> None:
    result = carriers.key_input_spec(ImageSpec(3, *size, 10), side)
    assert (result.channels, result.height, result.width, result.classes) == (3, *expected, 10)
