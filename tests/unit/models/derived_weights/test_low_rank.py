from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtlsign.errors import ModelError
from mtlsign.models.derived_weights import DerivedWeights

W, A, B = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)


def merged(tensors: dict[str, Tensor]) -> Tensor:
    return DerivedWeights(tensors).alternatives()[-1]["net.fc.weight"]


@pytest.mark.parametrize("names", [
    ("weight", "lora_A.weight", "lora_B.weight"),
    ("weight", "lora_A", "lora_B"),
    ("weight", "lora_down.weight", "lora_up.weight"),
    ("base_layer.weight", "lora_A.weight", "lora_B.weight"),
    ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"),
], ids=" ".join)  # fmt: skip
def test_adapter_is_added_to_its_kernel(names: tuple[str, str, str]) -> None:
    tensors = {f"net.fc.{name}": tensor for name, tensor in zip(names, (W, A, B), strict=True)}
    torch.testing.assert_close(merged(tensors), W + B @ A)
    views = DerivedWeights(tensors).alternatives()
    assert len(views) == (2 if names[0] == "weight" else 1)
    assert set(views[0]) == {"net.fc.weight"} and (
        len(views) == 1 or torch.equal(views[0]["net.fc.weight"], W)
    )


def test_alpha_of_the_file_scales_the_adapter() -> None:
    tensors = {"net.fc.weight": W, "net.fc.lora_down.weight": A, "net.fc.lora_up.weight": B}
    scaled = merged({**tensors, "net.fc.alpha": torch.tensor(8.0)})
    torch.testing.assert_close(scaled, W + 4 * B @ A)
    with pytest.raises(ModelError, match="alpha"):
        merged({**tensors, "net.fc.alpha": torch.ones(2)})


def test_adapter_of_a_convolution_is_added() -> None:
    kernel, down, up = torch.randn(6, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1)
    tensors = {"net.fc.weight": kernel, "net.fc.lora_A.weight": down, "net.fc.lora_B.weight": up}
    expected = kernel + torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    torch.testing.assert_close(merged(tensors), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("down", "up"),
    [(A[:, :3], B), (A, B[:, :1]), (A, B[:5]), (A[0], B), (A * float("nan"), B), (A.long(), B)],
)
def test_adapter_that_does_not_fit_is_an_error(down: Tensor, up: Tensor) -> None:
    tensors = {"net.fc.weight": W, "net.fc.lora_A.weight": down, "net.fc.lora_B.weight": up}
    with pytest.raises(ModelError):
        merged(tensors)
