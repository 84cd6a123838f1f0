from __future__ import annotations

import typing

import pytest
import torch
from torch import nn

from mtlsign.attacks import NotApplicableError
from mtlsign.attacks.file_rewriting import Form
from mtlsign.models.derived_weights import DerivedWeights
from mtlsign.schemes.mtlsign import MTLSignKey, MTLSignScheme
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.tasks import Task
from tests.unit.attacks.helpers import changed_parameters, difference, network, run

FORMS = typing.get_args(Form)

READABLE = set(FORMS)


@pytest.mark.parametrize("form", FORMS)
def test_rewrite_file_changes_tensors_and_not_the_network(form: str, tiny_task: Task) -> None:
    model = network("depthwise")
    outcome = run(f"rewrite_file:form={form}", model, tiny_task)
    assert outcome.tensors is not None and not outcome.model.training
    tensors = parse_safetensors(serialize_safetensors(outcome.tensors))
    state = outcome.model.state_dict()
    same = tensors.keys() == state.keys() and all(
        t.dtype == tensors[n].dtype and torch.equal(t, tensors[n]) for n, t in state.items()
    )
    assert not same
    assert bool(changed_parameters(model, outcome.model)) == (form in ("half", "int8"))
    assert difference(model, outcome) < (0.1 if form in ("half", "int8") else 1e-12)


@pytest.mark.parametrize("form", ["weight_norm", "int8"])
def test_kernels_of_several_tensors_are_read_as_those_of_the_network(form: str, tiny_task: Task) -> None:
    outcome = run(f"rewrite_file:form={form}", network("grouped"), tiny_task)
    assert outcome.tensors is not None
    for view in (
        DerivedWeights(outcome.tensors).alternatives()[:1]
        + DerivedWeights(outcome.tensors).alternatives()[1:]
    ):
        if form == "weight_norm" or view.form_of("stem.weight") >= 0:
            expected = outcome.model.get_parameter("stem.weight")
            torch.testing.assert_close(view["stem.weight"], expected.detach(), rtol=1e-5, atol=1e-6)


def test_lora_and_padded_kernels_add_up_to_those_of_the_network(tiny_task: Task) -> None:
    model = network("plain")
    state, tensors = model.state_dict(), run("rewrite_file:form=lora", model, tiny_task).tensors
    assert tensors is not None
    for layer in ("0", "3", "7"):
        a, b = (tensors[f"{layer}.lora_{x}.weight"].flatten(1) for x in "AB")
        total = tensors[f"{layer}.weight"] + (b @ a).reshape(state[f"{layer}.weight"].shape)
        torch.testing.assert_close(total, state[f"{layer}.weight"], rtol=0, atol=1e-5)
    padded = run("rewrite_file:form=padded", model, tiny_task).tensors
    assert padded is not None and torch.equal(padded["0.weight"][:, :, 1:4, 1:4], state["0.weight"])
    assert int((padded["0.weight"] != 0).sum()) == state["0.weight"].numel()


def test_form_without_kernel_is_not_applicable(tiny_task: Task) -> None:
    dense = nn.Sequential(nn.Flatten(), nn.Linear(24 * 24, 4)).eval()
    for form in ("padded", "hwio", "ohwi", "flat"):
        with pytest.raises(NotApplicableError, match=f"no kernel for form={form}"):
            run(f"rewrite_file:form={form}", dense, tiny_task)


@pytest.mark.parametrize("form", FORMS)
def test_scheme_verifies_the_file_and_not_the_module(
    form: str, marked_module: nn.Module, tiny_task: Task, key: MTLSignKey
) -> None:
    outcome = run(f"rewrite_file:form={form}", marked_module, tiny_task)
    scheme = MTLSignScheme(min_evidence_bits=60)
    detection = scheme.verify(outcome.model, key, outcome.tensors)
    expected = scheme.verify(marked_module, key)
    assert scheme.verify(outcome.model, key).accepted
    if form in READABLE:
        assert detection.accepted and abs(detection.matched - expected.matched) <= 2
    else:
        assert not detection.accepted


def test_later_attack_saves_a_plain_file_again(marked_module: nn.Module, tiny_task: Task) -> None:
    assert run("rewrite_file:form=half+noise", marked_module, tiny_task).tensors is None
    assert run("noise+rewrite_file:form=half", marked_module, tiny_task).tensors is not None
