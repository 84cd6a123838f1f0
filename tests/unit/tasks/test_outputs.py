from __future__ import annotations

from collections import OrderedDict, UserDict
from typing import Any

import pytest
import torch

from mtlsign.errors import DataError
from mtlsign.tasks.outputs import default_logits

LOGITS = torch.ones(2, 3)
OTHER = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "outputs",
    [
        LOGITS,
        {"loss": OTHER, "logits": LOGITS},
        OrderedDict(out=LOGITS, aux=OTHER),
        UserDict(scores=LOGITS),
        (LOGITS, OTHER),
        [None, LOGITS],
    ],
)
def test_default_logits_of_common_outputs(outputs: Any) -> None:
    assert default_logits(outputs) is LOGITS


@pytest.mark.parametrize("outputs", [{"a": LOGITS, "b": OTHER}, {}, (), None, [{"boxes": OTHER}]])
def test_default_logits_of_ambiguous_outputs_names_the_hook(outputs: Any) -> None:
    with pytest.raises(DataError, match=r"^logits_of: The network returned .* Pass logits_of"):
        default_logits(outputs)
