from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mtlsign.models.architectures import architecture_for, build
from mtlsign.models.taps import last_layer, tapped_layers
from mtlsign.watermark.verification.alignment import Aligner
from mtlsign.watermark.verification.alignment.assignment import best_assignment
from mtlsign.watermark.verification.alignment.inputs import SQUARES, fit_mix, signed_permutations, squares_for
from mtlsign.watermark.verification.reference import make_reference
from mtlsign.watermark.verification.response_bases import placeholder_bases
from mtlsign.watermark.verification.scaling import apply_bn_sign
from mtlsign.watermark.verification.sketches import projection_matrix
from tests.unit.models.channel_permutation import permuted_copy
from tests.unit.models.test_channel_sets import Mixed

Tensors = dict[str, Tensor]
YUV = torch.tensor([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.1]])


def resnet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build(architecture_for("resnet18", channels=3, classes=10, width=8)).eval()


def mixed(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Mixed().eval()


NETWORKS = {"resnet": resnet, "mixed": mixed}


@cache
def aligner_and_suspect(name: str) -> tuple[Aligner, nn.Module]:
    """Return the aligner of a network with γ of both signs, and the network with a little noise."""
    model = NETWORKS[name](0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(
                    torch.where(torch.rand(len(module.weight), generator=generator) < 0.3, -1, 1)
                )
    sample, taps = torch.zeros(2, 3, 24, 24), (last_layer(model),)
    reference = make_reference(model, taps, sample, bases=placeholder_bases(model, taps, sample))
    suspect = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in suspect.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * parameter.std() * noise)
    return Aligner(NETWORKS[name](5), taps, reference, sample), suspect


def kernels_of(model: nn.Module, aligner: Aligner) -> Tensors:
    return {name: model.state_dict()[name].clone() for name in aligner.layers}


def signed(model: nn.Module, aligner: Aligner) -> Tensors:
    """Return the kernels with the signs of γ on their rows, as an aligned suspect has them."""
    layers = tapped_layers(model, (last_layer(model),), torch.zeros(2, 3, 24, 24))
    gammas = {x.weight: model.get_submodule(x.batch_norm).weight for x in layers if x.batch_norm}
    return {
        name: apply_bn_sign(kernel, gammas.get(name)) for name, kernel in kernels_of(model, aligner).items()
    }


def turned(kernels: Tensors, aligner: Aligner) -> Tensors:
    """Return kernels for images that are rotated by a quarter, also behind flattened positions."""
    result = {}
    for name, kernel in kernels.items():
        layer = aligner.layers[name]
        square = kernel.reshape(len(kernel), -1, *layer.window)
        result[name] = square.transpose(2, 3).flip(2).reshape(kernel.shape) if layer.positions > 1 else kernel
    return result


@pytest.mark.parametrize("name", NETWORKS)
def test_align_of_permuted_network_gives_the_kernels_before(name: str) -> None:
    aligner, suspect = aligner_and_suspect(name)
    expected = signed(suspect, aligner)
    for seed, turn in ((0, False), (1, True)):
        kernels = kernels_of(permuted_copy(suspect, aligner.sets, seed), aligner)
        alignment = aligner.align(turned(kernels, aligner) if turn else kernels)
        assert alignment.similarity > 0.8 and alignment.kernels.keys() == expected.keys()
        for kernel_name, kernel in expected.items():
            torch.testing.assert_close(alignment.kernels[kernel_name], kernel, msg=kernel_name)


@pytest.mark.parametrize(
    "mix", [-torch.eye(3), torch.diag(torch.tensor([1.0, -1, 1])), torch.eye(3).flip(0), YUV]
)
def test_align_undoes_mixed_input_channels(mix: Tensor) -> None:
    aligner, suspect = aligner_and_suspect("resnet")
    expected = signed(suspect, aligner)
    kernels = kernels_of(permuted_copy(suspect, aligner.sets), aligner)
    kernels["conv1.weight"] = torch.einsum("ocyx,cd->odyx", kernels["conv1.weight"], torch.linalg.inv(mix))
    aligned = aligner.align(kernels).kernels
    for name, kernel in expected.items():
        if name != "conv1.weight":
            torch.testing.assert_close(aligned[name], kernel, msg=name)
    rows, wanted = aligned["conv1.weight"].flatten(1), expected["conv1.weight"].flatten(1)
    assert torch.nn.functional.cosine_similarity(rows, wanted).min() > 0.97


def test_align_drops_channels_that_nothing_reads_and_merges_copies() -> None:
    aligner, suspect = aligner_and_suspect("resnet")
    expected, kernels = signed(suspect, aligner), kernels_of(suspect, aligner)
    generator = torch.Generator().manual_seed(3)
    first, second = "layer1.0.conv1.weight", "layer1.0.conv2.weight"
    rows, columns = kernels[first], kernels[second]
    unread = torch.randn(2, *rows.shape[1:], generator=generator)
    part = torch.randn(len(columns), 1, 3, 3, generator=generator)
    kernels[first] = torch.cat([unread[:1], rows, rows[2:3], unread[1:], unread[1:]])
    columns = columns.clone()
    columns[:, 2:3] -= part
    # one channel that nothing reads, a copy with a part of the columns, two that cancel each other
    kernels[second] = torch.cat([torch.zeros_like(part), columns, part, part, -part], 1)
    aligned = aligner.align(kernels).kernels
    for name, kernel in expected.items():
        torch.testing.assert_close(aligned[name], kernel, msg=name, rtol=1e-5, atol=1e-6)


def test_align_of_network_with_fewer_channels_leaves_zeros() -> None:
    aligner, suspect = aligner_and_suspect("resnet")
    expected, kernels = signed(suspect, aligner), kernels_of(suspect, aligner)
    kernels["layer1.0.conv1.weight"] = kernels["layer1.0.conv1.weight"][1:]
    kernels["layer1.0.conv2.weight"] = kernels["layer1.0.conv2.weight"][:, 1:]
    aligned = aligner.align(kernels).kernels
    expected["layer1.0.conv1.weight"][0] = 0
    expected["layer1.0.conv2.weight"][:, 0] = 0
    for name, kernel in expected.items():
        torch.testing.assert_close(aligned[name], kernel, msg=name)


def test_align_leaves_out_kernels_that_do_not_fit_and_tolerates_missing_ones() -> None:
    aligner, suspect = aligner_and_suspect("resnet")
    expected, kernels = signed(suspect, aligner), kernels_of(suspect, aligner)
    kernels["layer1.0.conv2.weight"] = kernels["layer1.0.conv2.weight"][:, :3]
    del kernels["layer2.0.conv1.weight"], kernels["conv1.weight"]
    aligned = aligner.align(kernels).kernels
    assert expected.keys() - aligned.keys() == {
        "layer1.0.conv2.weight", "layer2.0.conv1.weight", "conv1.weight"
    }  # fmt: skip
    for name, kernel in aligned.items():
        torch.testing.assert_close(kernel, expected[name], msg=name)
    assert aligner.align({}).kernels == {} and aligner.align({"x": torch.ones(2)}).kernels.keys() == {"x"}


def test_recognizes_descendants_and_no_independent_network() -> None:
    aligner, suspect = aligner_and_suspect("resnet")
    assert aligner.recognizes(kernels_of(permuted_copy(suspect, aligner.sets), aligner))
    for seed in (7, 8):
        independent = kernels_of(resnet(seed), aligner)
        assert not aligner.recognizes(independent) and aligner.align(independent).similarity < 0.6
    assert not aligner.recognizes({name: torch.zeros_like(k) for name, k in independent.items()})


def test_align_takes_equal_kernels_from_any_batch_norm_values() -> None:
    aligner, suspect = aligner_and_suspect("resnet")
    kernels = kernels_of(suspect, aligner)
    scaled = {name: kernel * (3.0 if name != "fc.weight" else 1.0) for name, kernel in kernels.items()}
    scaled["layer2.0.conv1.weight"] = -scaled["layer2.0.conv1.weight"]
    expected, aligned = aligner.align(kernels).kernels, aligner.align(scaled).kernels
    for name in expected:
        torch.testing.assert_close(aligned[name], expected[name] * (1.0 if name == "fc.weight" else 3.0))


def test_best_assignment_prefers_the_largest_total_and_marks_rows_without_column() -> None:
    assert best_assignment(np.array([[0.9, 0.8], [0.8, 0.1]])).tolist() == [1, 0]
    assert best_assignment(np.array([[0.1, 0.9, 0.0]])).tolist() == [1]
    assert sorted(best_assignment(np.array([[0.9], [0.1]])).tolist()) == [-1, 0]


def test_squares_that_transpose_need_square_windows() -> None:
    assert len(squares_for([(3, 3), (1, 1)])) == 8 and len(squares_for([(3, 3), (1, 7)])) == 4
    assert len({tuple(square.order((3, 3))) for square in SQUARES}) == 8


def test_signed_permutations_of_few_channels_are_complete() -> None:
    assert len(signed_permutations(3, free_signs=False)) == 48
    assert len(signed_permutations(3, free_signs=True)) == 24
    assert len(signed_permutations(5, free_signs=False)) == 1


def test_fit_mix_returns_none_without_a_clear_mix() -> None:
    generator = np.random.default_rng(0)
    kernel, matrix = generator.normal(size=(16, 3, 9)), projection_matrix(27, 12)
    norms = np.linalg.norm(kernel.reshape(16, -1), axis=1, keepdims=True)
    sketch = (kernel.reshape(16, -1) / norms) @ matrix
    noisy = sketch + 0.02 * generator.normal(size=sketch.shape)
    assert fit_mix(kernel, matrix.reshape(3, 9, 12), noisy) is None
    mix = YUV.double().numpy()
    found = fit_mix(np.einsum("ock,cd->odk", kernel, np.linalg.inv(mix)), matrix.reshape(3, 9, 12), sketch)
    assert found is not None
    np.testing.assert_allclose(np.abs(found / found[0, 0]), np.abs(mix / mix[0, 0]), rtol=0.05, atol=0.05)
