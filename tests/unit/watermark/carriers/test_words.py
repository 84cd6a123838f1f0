from __future__ import annotations

import numpy as np
import pytest
import torch

from mtlsign.errors import CarrierError, KeyMaterialError
from mtlsign.models.input_spec import ImageSpec, TextSpec
from mtlsign.watermark import carriers
from mtlsign.watermark.carriers.words import WordCarrier
from mtlsign.watermark.keys.opening import watermark_integers

TEXTS = TextSpec(vocabulary=5000, embedding=50, length=56, classes=5)


def test_make_for_texts_gives_eight_of_1024_words() -> None:
    fields = carriers.make(carriers.kind_for(TEXTS), 1024, TEXTS)
    assert fields == {"kind": "words", "base": 1024, "digits": 3, "length": 8}
    carrier = carriers.parse(fields)
    assert carrier.element_shape == (8,) and carrier.number_count(10) == 80
    assert carrier.sample().shape == (2, 8) and carrier.sample().dtype == torch.int64


def test_inputs_begin_with_the_digits_of_the_integer() -> None:
    carrier = WordCarrier.parse({"kind": "words", "base": 1024, "digits": 3, "length": 8})
    integers = np.array([0, 1, 1023, 1024, 5 * 1024**2 + 6 * 1024 + 7])
    inputs = carrier.inputs(integers)
    assert inputs.dtype == torch.int64 and int(inputs.min()) >= 2 and int(inputs.max()) < 1026
    digits = [[0, 0, 0], [0, 0, 1], [0, 0, 1023], [0, 1, 0], [5, 6, 7]]
    assert (inputs[:, :3] - 2).tolist() == digits
    # Known values, so that another version reads the same words.
    assert (inputs[4, 3:] - 2).tolist() == [397, 885, 410, 787, 902]


def test_inputs_of_different_integers_differ() -> None:
    carrier = WordCarrier.parse(carriers.make("words", 600, TEXTS))
    inputs = carrier.inputs(watermark_integers(bytes(32), 600))
    assert len(torch.unique(inputs, dim=0)) == 600


def test_make_refuses_small_vocabularies_short_texts_and_images() -> None:
    for spec in (TextSpec(3, 50, 56, 2), TextSpec(1026, 50, 2, 2), TextSpec(2, 50, 56, 2)):
        with pytest.raises(CarrierError, match="too few"):
            carriers.make("words", 1024, spec)
    with pytest.raises(CarrierError, match="need texts"):
        carriers.make("words", 1024, ImageSpec(1, 28, 28, 10))
    with pytest.raises(CarrierError, match="need images"):
        carriers.make("qr", 1024, TEXTS)


@pytest.mark.parametrize("integer", [-1, 1024**3])
def test_inputs_refuse_integers_outside_the_digits(integer: int) -> None:
    carrier = WordCarrier.parse({"kind": "words", "base": 1024, "digits": 3, "length": 8})
    with pytest.raises(CarrierError, match="from 0 to"):
        carrier.inputs(np.array([integer]))


@pytest.mark.parametrize(
    "change",
    [{"base": 1}, {"base": 2**16 + 1}, {"digits": 0}, {"digits": 9}, {"length": 1025}, {"height": 28}],
)
def test_parse_refuses_fields_outside_their_limits(change: dict[str, int]) -> None:
    fields = {"kind": "words", "base": 1024, "digits": 3, "length": 8} | change
    with pytest.raises(KeyMaterialError):
        carriers.parse(fields)


def test_check_refuses_long_sequences() -> None:
    carrier = WordCarrier.parse({"kind": "words", "base": 1024, "digits": 3, "length": 1024})
    carrier.check(4096)
    with pytest.raises(CarrierError, match="over"):
        carrier.check(2**15)
