"""Watermarks for neural networks: embed a signed key into the weights, verify it with a known error rate.

The `Identity` of an owner signs a *spec*. Spec, public key and signature are the `KeyOpening`; its hash is
the key. The key alone determines N key images with N bits, and a head that reads bits from features.
`embed` trains the early layers until the head gives those bits on the key images, while the network keeps
its accuracy on its task. It returns the marked model (public) and the `OwnerKit` (secret). `verify` runs
Algorithm 1 of Li et al. 2022 on any tensors and returns a `Verdict`: the number of matching bits, and the
probability of so many by chance.

    marked = mtlsign.embed(module, {"train": loader, "test": loader}, trained=True)
    verdict = mtlsign.verify(tensors, mtlsign.WatermarkDetector(opening, mtlsign.Reference.from_bytes(data)))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mtlsign._version import __version__ as __version__

#: Module of each public name.
_MODULES = {
    "EmbedSettings": "config.embed",
    "EmbeddingResult": "watermark.embedding.result",
    "Identity": "watermark.keys.identity",
    "KeyOpening": "watermark.keys.opening",
    "MTLSignError": "errors",
    "OwnerKit": "watermark.kit",
    "Reference": "watermark.verification.reference",
    "Task": "tasks",
    "Verdict": "watermark.verification.verdict",
    "WatermarkDetector": "watermark.verification.detector",
    "embed": "watermark.embedding.module",
    "read_kit": "watermark.kit",
    "read_model": "storage.model_folder",
    "verify": "watermark.verification.algorithm",
}
__all__ = [
    "EmbedSettings",
    "EmbeddingResult",
    "Identity",
    "KeyOpening",
    "MTLSignError",
    "OwnerKit",
    "Reference",
    "Task",
    "Verdict",
    "WatermarkDetector",
    "embed",
    "read_kit",
    "read_model",
    "verify",
]

if TYPE_CHECKING:
    from mtlsign.config.embed import EmbedSettings
    from mtlsign.errors import MTLSignError
    from mtlsign.storage.model_folder import read_model
    from mtlsign.tasks import Task
    from mtlsign.watermark.embedding.module import embed
    from mtlsign.watermark.embedding.result import EmbeddingResult
    from mtlsign.watermark.keys.identity import Identity
    from mtlsign.watermark.keys.opening import KeyOpening
    from mtlsign.watermark.kit import OwnerKit, read_kit
    from mtlsign.watermark.verification.algorithm import verify
    from mtlsign.watermark.verification.detector import WatermarkDetector
    from mtlsign.watermark.verification.reference import Reference
    from mtlsign.watermark.verification.verdict import Verdict


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import mtlsign` does not import torch."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"mtlsign.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'mtlsign' has no attribute {name!r}")
