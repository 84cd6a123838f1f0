"""The verifier's side: the batch encoder of QR codes, and verification against a bare forward pass."""

from __future__ import annotations

import numpy as np

from benchmarks.measure import Row, cost, ratio
from benchmarks.scene import Bare, Scene
from mtlsign.models import loading
from mtlsign.watermark.carriers import qr
from mtlsign.watermark.keys.opening import watermark_integers
from mtlsign.watermark.verification.detector import verify


def encoder(scene: Scene, pairs: int) -> list[Row]:
    """(d) `qrcode` per symbol / batch encoder per symbol, with its tables ready and from nothing."""
    digits, n = scene.detector.spec.carrier.digits, scene.detector.spec.n
    values = watermark_integers(scene.detector.key, n)
    drawn = values[: min(n, 128)]
    texts = [str(int(v)).zfill(digits) for v in drawn]
    assert np.array_equal(
        qr.encode_modules(drawn, digits), np.stack([qr.encode_with_library(t) for t in texts])
    )
    library, warm, cold = [], [], []
    for _ in range(pairs):
        seconds = cost(lambda: [qr.encode_with_library(t) for t in texts])
        library.append((seconds[0] / len(texts) * n, seconds[1] / len(texts) * n))
        warm.append(cost(lambda: qr.encode_modules(values, digits)))
        qr._tables.cache_clear()
        cold.append(cost(lambda: qr.encode_modules(values, digits)))
    note = f"{n} symbols; the library drew {len(texts)}, scaled"
    what = "qrcode library / QR batch encoder"
    return [
        ratio("qr", what, library, warm, at_least=20, clock="wall", note=note),
        ratio(
            "qr-cold",
            f"{what} with its tables still to make",
            library,
            cold,
            at_least=20,
            clock="wall",
            note=note,
        ),
    ]


def verification(scene: Scene, pairs: int) -> list[Row]:
    """(e) `verify` of a loaded model without controls / bare forward of the key set to the last tap."""
    tensors, bare = loading.cpu_state(scene.model), Bare(scene)
    a, b = [], []
    for i in range(pairs + 2):
        verified, forward = cost(lambda: verify(tensors, scene.detector)), cost(bare.key_forward)
        if i >= 2:
            a.append(verified)
            b.append(forward)
    what = "verification of a loaded model / bare forward of the key set through the tapped part"
    return [ratio("verify", what, a, b, at_most=1.3)]
