"""MTLSign: write a provable mark into a neural network's weights, and check it
later with a stated error probability.

An owner's `Identity` signs a *spec*; spec, public key and signature are the `KeyOpening`, whose hash is the
key. The key alone fixes N images with N bits and a read-out. `embed` trains the early weights of a network
until the read-out gives those bits in the *verifier's graph*, without hurting the network's task; it returns
the marked model (public) and the owner's `OwnerKit` (secret). `verify` runs Algorithm 1 of Li et al. 2022 on
anybody's tensors and answers with a `Verdict`: k of N bits agree, and how unlikely that is for a key that
the network does not carry.

    marked = mtlsign.embed(module, {"train": loader, "test": loader}, trained=True)
    verdict = mtlsign.verify(tensors, mtlsign.WatermarkDetector(opening, mtlsign.Reference.from_bytes(data)))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "EmbedSettings": "config.embed", "EmbeddingResult": "watermark.embedding.result", "Identity": "watermark.keys.identity",
    "OwnerKit": "watermark.kit", "KeyOpening": "watermark.keys.opening", "MTLSignError": "errors",
    "WatermarkDetector": "watermark.verification.detector", "Reference": "watermark.verification.reference", "Task": "tasks",
    "Verdict": "watermark.verification.detector", "embed": "watermark.embedding.pipeline", "read_kit": "watermark.kit",
    "read_model": "storage.model_folder", "verify": "watermark.verification.detector",
}  # fmt: skip
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
    from mtlsign.watermark.embedding.pipeline import embed
    from mtlsign.watermark.embedding.result import EmbeddingResult
    from mtlsign.watermark.keys.identity import Identity
    from mtlsign.watermark.keys.opening import KeyOpening
    from mtlsign.watermark.kit import OwnerKit, read_kit
    from mtlsign.watermark.verification.detector import Verdict, WatermarkDetector, verify
    from mtlsign.watermark.verification.reference import Reference


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that `import mtlsign` costs nothing."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"mtlsign.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mtlsign' has no attribute {name!r}")
