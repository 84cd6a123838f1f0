"""Products across linear channels: which kernels they join, and references that contradict them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet18, vgg11_bn

from mtlsign.errors import ArtifactError
from mtlsign.storage.safetensors_io import serialize_safetensors
from mtlsign.watermark.verification import response_bases as bases_module
from mtlsign.watermark.verification.linear_products import LinearProducts
from mtlsign.watermark.verification.reference import (
    Reference,
    found_products,
    make_reference,
    products_of_reference,
)
from mtlsign.watermark.verification.response_bases import response_bases
from mtlsign.watermark.verification.response_model import ResponseModel
from tests.unit.attacks.test_linear_channels import SIDE, Mobile, new_mobile
from tests.unit.watermark.verification.spread_examples import TAPS as NETWORK_TAPS
from tests.unit.watermark.verification.spread_examples import images, network

TAPS = ["fc"]
PRODUCTS = ["second.conv.0.0.product", "last.0.product"]


@pytest.fixture(scope="module")
def reference() -> Reference:
    model, inputs = new_mobile(), images(side=SIDE)
    return make_reference(model, TAPS, inputs[:2], bases=response_bases(model, TAPS, inputs))


def products(reference: Reference) -> LinearProducts:
    found = products_of_reference(Mobile(), TAPS, images(2, SIDE), reference)
    assert found is not None
    return found


def test_products_join_each_reader_and_the_writer_before_it(reference: Reference) -> None:
    found = products(reference).products
    assert [(product.name, product.writer, product.shape) for product in found] == [
        ("second.conv.0.0.product", "first.conv.2", (48, 32, 1, 1)),
        ("last.0.product", "second.conv.2", (32, 48, 1, 1)),
    ]
    described = {name.removesuffix("/basis") for name in reference.tensors if name.endswith("/basis")}
    assert set(PRODUCTS) < described
    assert not described & {"first.conv.2", "second.conv.0.0", "second.conv.2", "last.0"}


def test_every_narrow_kernel_of_a_mobilenet_is_in_a_product() -> None:
    model = mobilenet_v2(width_mult=0.25).eval()
    found = found_products(model, ["classifier.1"], torch.zeros(2, 3, 64, 64))
    assert len(found) == 16
    writers = [f"features.{k}.conv.{1 if k == 1 else 2}" for k in range(2, 18)]
    assert {product.writer for product in found} >= set(writers)


def test_product_is_that_of_kernels_and_batch_norm(reference: Reference) -> None:
    model, products_ = new_mobile(), products(reference)
    norm = model.get_submodule("first.conv.3")
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, 12))
    factors = (norm.weight / (norm.running_var + norm.eps).sqrt()).double()
    reader, writer = (
        model.get_parameter(f"{name}.weight").detach().double().flatten(1)
        for name in ("second.conv.0.0", "first.conv.2")
    )
    with_norm, without = products_.forms(products_.products[0], model.state_dict())
    assert torch.allclose(with_norm.double().flatten(1), reader @ (factors[:, None] * writer), atol=1e-5)
    assert torch.allclose(without.double().flatten(1), reader @ writer, atol=1e-5)


@torch.no_grad()
def test_window_of_the_reader_is_that_of_the_product() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)),
        *(nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)),
    ).eval()  # fmt: skip
    inputs = images(side=SIDE)
    (product,) = found_products(model, ["10"], inputs[:2])
    assert (product.name, product.shape, product.window_of) == ("5.product", (16, 8, 3, 3), "5")
    basis = response_bases(model, ["10"], inputs)["5.product"]
    assert basis.shape[:2] == (1, 72)
    features = model[:5](inputs[:1]).detach()
    narrow = model[:3](inputs[:1]).detach()
    norm = model[4]
    factors = norm.weight / (norm.running_var + norm.eps).sqrt()
    kernel = torch.einsum("odhw,di->oihw", model[5].weight, factors[:, None] * model[3].weight.flatten(1))
    expected = nn.functional.conv2d(features, model[5].weight, padding=1)
    actual = nn.functional.conv2d(narrow, kernel, padding=1)
    inner = (expected - actual)[:, :, 1:-1, 1:-1]  # equal up to a constant of each channel
    assert float((inner - inner.mean((2, 3), keepdim=True)).abs().max()) < 1e-5


@pytest.mark.parametrize("build", [lambda: resnet18(num_classes=4), lambda: vgg11_bn(num_classes=4)])
def test_networks_with_activations_have_no_products(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    assert found_products(model, [last], torch.zeros(2, 3, 64, 64)) == []


def test_reference_of_a_network_without_linear_channels_is_that_of_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = network(), images()

    def made() -> Reference:
        bases = response_bases(model, NETWORK_TAPS, inputs)
        return make_reference(model, NETWORK_TAPS, inputs[:2], bases=bases)

    new = made()
    monkeypatch.setattr(bases_module, "found_products", lambda *_: [])
    assert made().digest == new.digest


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("basis", lambda t: t[:, :-1]),
        ("basis", lambda t: t[0]),
        ("sketch", lambda t: t[:-1]),
        ("sketch", lambda t: t.repeat(1, 8)),
        ("sketch", lambda t: t[0, 0]),
        ("columns", lambda t: t[:, :-1]),
        ("sketch", None),
        ("columns", None),
    ],
)
def test_contradicting_description_of_a_product_raises(
    reference: Reference, name: str, change: Callable[[Tensor], Tensor] | None
) -> None:
    tensors, key = dict(reference.tensors), f"{PRODUCTS[0]}/{name}"
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors[key]).contiguous()
    data = serialize_safetensors(tensors)
    with pytest.raises(ArtifactError, match="does not"):
        ResponseModel(Mobile(), TAPS, Reference.from_bytes(data), images(2, SIDE))


def test_description_of_a_product_that_does_not_exist_raises(reference: Reference) -> None:
    tensors = dict(reference.tensors)
    for part in ("basis", "sketch", "columns"):
        tensors[f"first.conv.0.0.product/{part}"] = tensors[f"{PRODUCTS[0]}/{part}"].clone()
    data = serialize_safetensors(tensors)
    with pytest.raises(ArtifactError, match="does not hold"):
        ResponseModel(Mobile(), TAPS, Reference.from_bytes(data), images(2, SIDE))


def test_layers_may_name_kernels_of_products() -> None:
    model, inputs = new_mobile(), images(side=SIDE)
    bases = response_bases(model, TAPS, inputs, layers=["first.conv.2", "stem.0"])
    assert sorted(bases) == ["second.conv.0.0.product", "stem.0"]
