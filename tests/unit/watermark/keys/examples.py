"""Example spec and opening for the tests of keys."""

from __future__ import annotations

import copy
import json
from typing import Any

from mtlsign.watermark.carriers.qr import make_carrier
from mtlsign.watermark.keys import identity
from mtlsign.watermark.keys import opening as opening_module
from mtlsign.watermark.keys.spec import make_spec

FIELDS: dict[str, Any] = {
    "format": "mtlsign/v1",
    "name": "王's model",
    "nonce": "ab" * 32,
    "n": 600,
    "readouts": 1,
    "carrier": make_carrier(600, 1, 28, 28),
    "taps": ["layer1"],
    "head": {"kind": "keyed"},
    "statistic": "count",
    "normalise": "key-batch",
    "architecture": {
        "arch": "torchvision/resnet18",
        "channels": 1,
        "classes": 10,
        "width": 16,
        "stem": "cifar",
    },
    "reference": "cd" * 32,
}


OWNER = identity.Identity(bytes(range(32)), bytes(32))


SPEC = make_spec(**FIELDS)


OPENING = opening_module.sign_spec(OWNER, SPEC)


def changed(path: str, value: object) -> bytes:
    fields = copy.deepcopy(FIELDS)
    *parents, last = path.split(".")
    at = fields
    for parent in parents:
        at = at[parent]
    at[last] = value
    return json.dumps(fields).encode()
