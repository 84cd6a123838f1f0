"""Tests of read-outs: keys, shared models and copies without key data."""

from __future__ import annotations

import torch

from mtlsign.watermark import carriers
from mtlsign.watermark.keys.opening import keystream, watermark_integers, watermark_labels
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.readouts import (
    FeatureReadout,
    SpreadReadout,
    readout_key,
    watermark_dataset,
)
from tests.unit.watermark.verification.spread_examples import (
    KERNELS,
    N,
    example_detector,
    images,
    network,
)

KEY = bytes(range(32))
KEYED = {"head": {"kind": "keyed"}, "taps": ["2"], "n": N}


def spread_readout() -> SpreadReadout:
    (readout,) = example_detector().readouts
    assert isinstance(readout, SpreadReadout)
    return readout


def feature_readout() -> tuple[WatermarkDetector, FeatureReadout]:
    detector = example_detector(head={"kind": "keyed"}, taps=["2"])
    return detector, detector.feature_readout


def test_readout_key_is_key_itself_for_first_readout_and_keystream_after() -> None:
    assert readout_key(KEY, 0) == KEY
    assert readout_key(KEY, 1) == keystream(KEY, b"mtlsign/v1/readout/1", 32)
    assert len({readout_key(KEY, index) for index in range(4)}) == 4


def test_watermark_dataset_is_that_of_the_key_with_given_size() -> None:
    spec = example_detector().spec
    inputs, labels = watermark_dataset(spec, KEY, N)
    assert tuple(inputs.shape) == (N, 1, 21, 21) and inputs.dtype == torch.float32
    assert torch.equal(labels, torch.from_numpy(watermark_labels(KEY, N)))
    expected = carriers.for_spec(spec).inputs(watermark_integers(KEY, N))
    assert torch.equal(inputs, expected) and len(inputs.unique(dim=0)) == N


def test_spread_readout_with_key_equals_new_readout_of_that_key() -> None:
    readout, spec = spread_readout(), example_detector().spec
    kernels = readout.model.select_weights(network(4).state_dict())
    labels = torch.from_numpy(watermark_labels(KEY, N))
    new = SpreadReadout(readout.model, readout.spec, labels, KEY)
    other = readout.with_key(spec, KEY)
    assert other.model is readout.model and torch.equal(other.labels, labels)
    reading = readout.read(kernels)
    assert torch.equal(other.score(reading), new.score(reading))
    assert not torch.equal(other.score(reading), readout.score(reading))


def test_spread_readout_without_key_data_gives_same_scores_after_with_key() -> None:
    readout, detector = spread_readout(), example_detector()
    bare = readout.without_key_data()
    assert not hasattr(bare, "head") and len(bare.labels) == 0 and bare.model is readout.model
    again = bare.with_key(detector.spec, detector.key)
    reading = readout.read(readout.model.select_weights(network(4).state_dict()))
    assert torch.equal(again.score(reading), readout.score(reading))
    assert torch.equal(again.labels, readout.labels) and len(readout.labels) == N


def test_spread_readout_key_bytes_are_those_of_permutation_and_signs() -> None:
    readout = spread_readout()
    used = readout.head._order.numel()
    stored = sum(t.numel() * t.element_size() for t in (readout.head._order, readout.head._signs))
    assert readout.key_bytes == 9 * readout.model.coordinates and used <= readout.model.coordinates
    assert stored <= readout.key_bytes < stored + 9 * N
    assert readout.trained == [] and readout.tolerates_missing


def test_spread_readout_scores_of_unmarked_network_have_unit_variance() -> None:
    readout, spec = spread_readout(), example_detector().spec
    reading = readout.read(readout.model.select_weights(network(4).state_dict()))
    scores = torch.cat([readout.with_key(spec, bytes([i]) * 32).score(reading) for i in range(30)])
    assert abs(float(scores.mean())) < 0.1 and 0.9 < float(scores.std()) < 1.1


def test_spread_readout_selects_present_kernels_with_signs() -> None:
    readout, state = spread_readout(), network(4).state_dict()
    del state["9.weight"], state["7.weight"]
    kernels = readout.model.select_weights(state)
    assert list(kernels) == [name for name in KERNELS if name != "9.weight"]
    flipped = torch.where(state["4.weight"] < 0, -1.0, 1.0)[:, None, None, None]
    assert torch.equal(kernels["3.weight"], state["3.weight"] * flipped)
    assert torch.equal(kernels["6.weight"], state["6.weight"]), "γ is absent"


def test_feature_readout_without_key_data_gives_same_scores_after_with_key() -> None:
    detector, readout = feature_readout()
    bare = readout.without_key_data()
    assert len(bare.inputs) == len(bare.labels) == 0 == bare.key_bytes
    assert readout.key_bytes == N * 21 * 21 * 4 and not readout.tolerates_missing
    again = bare.with_key(detector.spec, detector.key)
    reading = readout.read(readout.model.select_weights(network(4).state_dict()))
    assert torch.equal(again.score(reading), readout.score(reading))
    assert torch.equal(again.labels, readout.labels) and again.model is readout.model


def test_further_readout_has_inputs_labels_and_head_of_another_key() -> None:
    detector = example_detector(readouts=[KEYED])
    further = detector.feature_readout
    inputs, labels = watermark_dataset(detector.spec, readout_key(detector.key, 1), N)
    assert torch.equal(further.inputs, inputs) and torch.equal(further.labels, labels)
    assert torch.equal(detector.labels, torch.cat([detector.readouts[0].labels, labels]))
    assert not torch.equal(detector.labels[:N], labels)
    alone = FeatureReadout(
        further.model, further.spec, inputs, labels, readout_key(detector.key, 1), head=None
    )
    reading = further.read(further.model.select_weights(network(4).state_dict()))
    assert torch.equal(alone.score(reading), further.score(reading))
    assert images(2).shape[2:] == inputs.shape[2:]
