"""Program that verifies files in a separate process, and prints every verdict or error as JSON.

Usage: python -m tests.unit.watermark.scenarios.verify_files FOLDER ONEDNN(on|off)
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from mtlsign.errors import MTLSignError
from mtlsign.service.problems import Problem
from mtlsign.service.verifier.lazy_safetensors import LazySafetensors
from mtlsign.storage.model_folder import read_model
from mtlsign.storage.safetensors_io import parse_safetensors
from mtlsign.watermark.keys.sealing import EncryptionSecret
from mtlsign.watermark.kit import detector_for_kit, read_kit
from mtlsign.watermark.verification.algorithm import verify

#: Kit key of the published test owner in tests/conftest.py.
KIT_KEY = bytes(range(32, 64))


def verdicts(folder: Path) -> dict[str, Any]:
    """Verify each file with each kit, as a job and as the service read it.

    A file whose name begins with the kind of a head is for the kit with that head.
    """
    results: dict[str, Any] = {}
    for kit_folder in sorted((folder / "kits").iterdir()):
        kit = read_kit(str(kit_folder), EncryptionSecret.from_kit_key(KIT_KEY))
        detector, base_weights = detector_for_kit(kit), parse_safetensors(kit.base_weights)
        options: dict[str, Any] = {"bits": 40, "controls": 2, "base_weights": base_weights}
        other_kinds = {"keyed", "spread"} - {detector.spec.head.kind}
        for path in sorted((folder / "files").iterdir()):
            if path.name.split(",")[0] in other_kinds:
                continue
            try:
                model = read_model(str(path))
                result = verify(model.tensors, detector, **options, model_digest=model.digest).to_json()
            except MTLSignError as error:
                result = {"error": type(error).__name__, "message": str(error)}
            try:
                suspect = LazySafetensors(path, hashlib.sha256(path.read_bytes()).hexdigest())
                served = verify(suspect, detector, **options).to_json()
            except Problem as problem:
                served = problem.document()
            results[f"{kit_folder.name} {path.name}"] = {"job": result, "service": served}
    return results


if __name__ == "__main__":
    torch.backends.mkldnn.enabled = sys.argv[2] == "on"
    print(json.dumps(verdicts(Path(sys.argv[1]))))
