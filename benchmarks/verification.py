"""Benchmarks of the verifier: batch encoder of QR codes, and verification against a bare forward pass."""

from __future__ import annotations

import numpy as np

from benchmarks.fixtures import BareForward, BenchmarkSetup
from benchmarks.measure import Row, cost, ratio
from mtlsign.models import loading
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.keys.opening import watermark_integers
from mtlsign.watermark.verification.algorithm import verify

_LIBRARY_SYMBOLS, _WARM_UP = 128, 2


def encoder(setup: BenchmarkSetup, pairs: int) -> list[Row]:
    """Compare `qrcode` with the batch encoder, per symbol, with its tables cached and without."""
    digits, n = setup.detector.spec.carrier.digits, setup.detector.spec.n
    values = watermark_integers(setup.detector.key, n)
    sample = values[: min(n, _LIBRARY_SYMBOLS)]
    texts = [str(int(v)).zfill(digits) for v in sample]
    assert np.array_equal(
        qr.encode_modules(sample, digits), np.stack([qr.encode_with_library(t) for t in texts])
    )
    library, warm, cold = [], [], []
    for _ in range(pairs):
        seconds = cost(lambda: [qr.encode_with_library(t) for t in texts])
        library.append((seconds[0] / len(texts) * n, seconds[1] / len(texts) * n))
        warm.append(cost(lambda: qr.encode_modules(values, digits)))
        qr._tables.cache_clear()
        cold.append(cost(lambda: qr.encode_modules(values, digits)))
    note = f"{n} symbols; the library drew {len(texts)}, scaled to {n}"
    title = "qrcode library / QR batch encoder"
    return [
        ratio("qr", title, library, warm, at_least=20, clock="wall", note=note),
        ratio(
            "qr-cold", f"{title} without cached tables", library, cold, at_least=20, clock="wall", note=note
        ),
    ]


def verification(setup: BenchmarkSetup, pairs: int) -> list[Row]:
    """Compare `verify` of a loaded model, without controls, with a bare forward of the key set."""
    tensors, bare = loading.cpu_state(setup.model), BareForward(setup)
    a, b = [], []
    for i in range(pairs + _WARM_UP):
        verified, forward = cost(lambda: verify(tensors, setup.detector)), cost(bare.run_key_forward)
        if i >= _WARM_UP:
            a.append(verified)
            b.append(forward)
    title = "verification of a loaded model / bare forward of the key set through the tapped part"
    return [ratio("verify", title, a, b, at_most=1.3)]
