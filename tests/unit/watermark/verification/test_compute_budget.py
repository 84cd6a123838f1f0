from __future__ import annotations

import time
from typing import Any

import pytest

from mtlsign.errors import ArtifactError
from mtlsign.models.architectures import architecture_for
from mtlsign.models.input_spec import TextSpec
from mtlsign.watermark import carriers
from mtlsign.watermark.keys.spec import make_spec, parse_spec
from mtlsign.watermark.verification.compute_budget import check_claim_budget

TEXTS = TextSpec(vocabulary=1000, embedding=64, length=20, classes=2)
NETWORK = architecture_for("transformer", classes=2, vocabulary=1000, embedding=64, width=64)


def cost(**changes: Any) -> float:
    spec = make_spec(
        name="budget", nonce="ab" * 32, n=128, taps=["blocks.0"], head={"kind": "spread"}, statistic="count",
        carrier=carriers.make("words", 128, TEXTS), reference="cd" * 32, architecture=NETWORK | changes,
    )  # fmt: skip
    return check_claim_budget(parse_spec(spec))


def test_cost_of_transformer_grows_with_heads_and_width() -> None:
    assert 0 < cost() < cost(heads=8, kv_heads=8) < cost(heads=8, kv_heads=8, embedding=128) < 30


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": 256, "kv_heads": 256, "head_size": 16, "embedding": 4096, "vocabulary": 3},
        {"vocabulary": 1_000_000, "embedding": 4096},
        {"inner": 65_536, "embedding": 4096, "layers": 128, "vocabulary": 1000},
    ],
)
def test_transformer_of_hostile_sizes_is_refused_before_anything_is_allocated(
    changes: dict[str, int],
) -> None:
    started = time.process_time()
    with pytest.raises(ArtifactError, match="Verify the claim on your own machine"):
        cost(**changes)
    assert time.process_time() - started < 20
