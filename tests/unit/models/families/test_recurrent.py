from __future__ import annotations

import pytest
import torch

from mtlsign.errors import ModelError
from mtlsign.models.architectures import architecture_for, build, default_taps

FIELDS = {"vocabulary": 30, "embedding": 6, "classes": 3}


@pytest.mark.parametrize("name", ["lstm", "bilstm", "gru", "bigru"])
def test_logits_do_not_depend_on_padding(name: str) -> None:
    model = build(architecture_for(name, **FIELDS, width=8)).eval()
    tokens = torch.tensor([[4, 9, 2], [7, 0, 0], [0, 0, 0]])
    longer = torch.nn.functional.pad(tokens, (0, 4))
    logits = model(tokens)
    torch.testing.assert_close(model(longer), logits)
    torch.testing.assert_close(model(tokens[1:2, :1]), logits[1:2])
    assert logits.shape == (3, 3) and bool(torch.isfinite(logits).all())
    assert default_taps(model, "spread") == default_taps(model, "keyed") == ("encoder",)


def test_word_vectors_are_frozen() -> None:
    model = build(architecture_for("bilstm", **FIELDS, width=8))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["embedding.weight"]


def test_architecture_for_refuses_networks_of_other_inputs() -> None:
    with pytest.raises(ModelError, match="reads images, and the task has texts"):
        architecture_for("resnet18", **FIELDS)
    with pytest.raises(ModelError, match="reads texts, and the task has images"):
        architecture_for("bilstm", channels=1, classes=3)
    for fields in ({"vocabulary": 2}, {"embedding": 1}, {"vocabulary": 2**40}):
        with pytest.raises(ModelError, match="whole number from"):
            architecture_for("bilstm", **(FIELDS | fields), width=8)


def test_build_on_meta_device_gives_shapes_without_lengths() -> None:
    with torch.device("meta"):
        model = build(architecture_for("bilstm", **FIELDS, width=8))
        assert model(torch.ones(2, 5, dtype=torch.int64)).shape == (2, 3)
