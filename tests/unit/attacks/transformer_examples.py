"""Tiny marked transformers: an encoder with norms before, one with norms after the sub-layers, a decoder."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

import mtlsign
from mtlsign.models.architectures import architecture_for, build
from mtlsign.watermark.embedding.result import EmbeddingResult
from mtlsign.watermark.keys.identity import Identity
from tests.unit.attacks.text_examples import OPTIONS, SPEC, text_task

KINDS: dict[str, dict[str, Any]] = {
    "pre": {},
    "post": {"order": "post", "pooling": "first"},
    "rms": {
        "norm": "rms", "positions": "rotary", "kv_heads": 1, "gated": 1, "activation": "silu", "bias": 0,
    },
}  # fmt: skip


def architecture(kind: str) -> dict[str, object]:
    """Return the architecture of one kind."""
    fields = architecture_for("transformer", **SPEC.architecture_fields | {"embedding": 12}, width=32)
    return fields | {"length": 10, "inner": 48} | KINDS[kind]


@cache
def marked_transformer(kind: str) -> tuple[nn.Module, EmbeddingResult, Identity]:
    """Return a marked network, its result and the owner; callers must not change it."""
    torch.manual_seed(0)
    model, owner = build(architecture(kind)), Identity.generate()
    result = mtlsign.embed(model, text_task(), identity=owner, architecture=architecture(kind), **OPTIONS)
    return model.eval(), result, owner
