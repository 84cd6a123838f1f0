"""Scenarios: changes that leave a network's function unchanged do not change the verdict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlsign.watermark.verification.algorithm import verify
from mtlsign.watermark.verification.detector import WatermarkDetector

Tensors = dict[str, Tensor]


Marked = tuple[Tensors, Any]


X = torch.randn(6, 1, 24, 24, generator=torch.Generator().manual_seed(9))


BLOCKS = ("layer1.0", "layer1.1")


def positive(count: int, seed: int) -> Tensor:
    return torch.exp(1.5 * torch.randn(count, generator=torch.Generator().manual_seed(seed)))


def columns(kernel: Tensor, scale: Tensor) -> Tensor:
    return kernel * scale.reshape(1, -1, 1, 1)


def rows(kernel: Tensor, scale: Tensor) -> Tensor:
    return kernel * scale.reshape(-1, 1, 1, 1)


def scale_output(state: Tensors, bn: str, scale: Tensor) -> None:
    state[f"{bn}.weight"] = state[f"{bn}.weight"] * scale
    state[f"{bn}.bias"] = state[f"{bn}.bias"] * scale


def reparameterize_batch_norms(state: Tensors) -> None:
    """Replace (γ, σ²) by (aγ, a²σ²) and (μ, β) by (μ + t, β + γt/σ); the function is equal up to ε."""
    for i, bn in enumerate(n[: -len(".running_var")] for n in list(state) if n.endswith(".running_var")):
        var, gamma = state[f"{bn}.running_var"] + 1e-5, state[f"{bn}.weight"]
        t, a = torch.randn(len(var), generator=torch.Generator().manual_seed(i)), positive(len(var), i)
        state[f"{bn}.running_mean"] = state[f"{bn}.running_mean"] + t
        state[f"{bn}.bias"] = state[f"{bn}.bias"] + gamma * t / var.sqrt()
        state[f"{bn}.running_var"], state[f"{bn}.weight"] = a * a * var - 1e-5, a * gamma


def scale_kernel_rows(state: Tensors) -> None:
    """Scale each row by a positive number, which the batch norm undoes, and flip signs with those of γ."""
    for i, bn in enumerate(("bn1", *(f"{b}.bn{c}" for b in BLOCKS for c in (1, 2)))):
        conv = bn.replace("bn", "conv") + ".weight"
        scale = positive(8, i)
        flip = torch.where(torch.arange(8) % 3 == 0, -1.0, 1.0)
        state[conv] = rows(state[conv], scale * flip)
        state[f"{bn}.running_mean"] = state[f"{bn}.running_mean"] * scale * flip
        state[f"{bn}.running_var"] = (state[f"{bn}.running_var"] + 1e-5) * scale**2 - 1e-5
        state[f"{bn}.weight"] = state[f"{bn}.weight"] * flip


def scale_inner_channels(state: Tensors) -> None:
    """Scale channels up in one layer and down in the next; ReLU passes positive scales on."""
    for i, block in enumerate(BLOCKS):
        scale = positive(8, i)
        scale_output(state, f"{block}.bn1", scale)
        state[f"{block}.conv2.weight"] = columns(state[f"{block}.conv2.weight"], 1 / scale)


def scale_residual_channels(state: Tensors) -> None:
    """Scale all residual channels of stage 1."""
    scale = positive(8, 7)
    for bn in ("bn1", *(f"{block}.bn2" for block in BLOCKS)):
        scale_output(state, bn, scale)
    for conv in (*(f"{block}.conv1" for block in BLOCKS), "layer2.0.conv1", "layer2.0.downsample.0"):
        state[f"{conv}.weight"] = columns(state[f"{conv}.weight"], 1 / scale)


def apply_all(state: Tensors) -> None:
    for change in (
        reparameterize_batch_norms,
        scale_kernel_rows,
        scale_inner_channels,
        scale_residual_channels,
    ):
        change(state)


def fold_batch_norms(state: Tensors) -> Tensors:
    """Fold each batch norm of stage 1 into its convolution, which gets a bias."""
    out = dict(state)
    for bn in ("bn1", *(f"{b}.bn{c}" for b in BLOCKS for c in (1, 2))):
        conv = bn.replace("bn", "conv")
        factor = out[f"{bn}.weight"] / (out[f"{bn}.running_var"] + 1e-5).sqrt()
        out[f"{conv}.bias"] = out[f"{bn}.bias"] - factor * out[f"{bn}.running_mean"]
        out[f"{conv}.weight"] = rows(out[f"{conv}.weight"], factor)
        for name in [n for n in out if n.startswith(f"{bn}.")]:
            del out[name]
    return out


def accuracy(tensors: Tensors, detector: WatermarkDetector) -> float:
    return verify(tensors, detector).accuracy


@pytest.mark.parametrize(
    "change",
    [reparameterize_batch_norms, scale_kernel_rows, scale_inner_channels, scale_residual_channels, apply_all],
)
def test_verify_is_invariant_to_function_preserving_scalings(
    change: Callable[[Tensors], None],
    marked_model: Marked,
    detector: WatermarkDetector,
    tiny_model: Callable[..., nn.Module],
) -> None:
    state = {name: t.clone() for name, t in marked_model[1].tensors.items()}
    assert any((state[n] < 0).any() for n in detector.optional_shapes)
    model = tiny_model().eval()
    model.load_state_dict(state)
    before, changed = model(X), dict(state)
    change(changed)
    model.load_state_dict(changed)
    torch.testing.assert_close(model(X), before, rtol=1e-3, atol=1e-3)  # the change does not cost accuracy
    changed_kernels = [
        n for n in detector.weight_shapes if not torch.allclose(changed[n], state[n], rtol=0.1)
    ]
    assert changed_kernels or change is reparameterize_batch_norms
    one, two = verify(state, detector), verify(changed, detector)
    assert (two.matches, two.status, two.near_zero) == (one.matches, one.status, one.near_zero)
    torch.testing.assert_close(
        detector.score_state_dict(changed).scores, detector.score_state_dict(state).scores, rtol=0, atol=2e-2
    )


@pytest.mark.parametrize("change", [None, apply_all])
def test_verify_is_invariant_to_folded_batch_norms(
    change: Callable[[Tensors], None] | None, marked_model: Marked, detector: WatermarkDetector
) -> None:
    state = {name: t.clone() for name, t in marked_model[1].tensors.items()}
    expected, expected_scores = verify(state, detector), detector.score_state_dict(state).scores
    if change is not None:
        change(state)
    suspect = fold_batch_norms(state)
    assert "conv1.bias" in suspect and "bn1.weight" not in suspect
    assert verify(suspect, detector).matches == expected.matches
    torch.testing.assert_close(detector.score_state_dict(suspect).scores, expected_scores, rtol=0, atol=2e-2)


def test_verify_of_permuted_channels_loses_matches(marked_model: Marked, detector: WatermarkDetector) -> None:
    """The other tests can fail: the canonical form does not undo permutations (format v1 will)."""
    state = dict(marked_model[1].tensors)
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"].roll(1, 0)
    assert accuracy(state, detector) < 0.9
