"""Commitment to a key between the phases: W0 → reference → spec → signature (docs/decisions/0004)."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import ModelError
from mtlsign.models import architectures
from mtlsign.models.architectures import HeadKind
from mtlsign.models.detectors import template_of
from mtlsign.models.factories import Factory
from mtlsign.models.initial_weights import initialize_from_checkpoint
from mtlsign.models.input_spec import InputSpec
from mtlsign.models.loading import Tensors, cpu_state, load_tensors
from mtlsign.models.taps import eval_mode
from mtlsign.tasks import Task
from mtlsign.watermark import carriers
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening, sign_spec
from mtlsign.watermark.keys.spec import make_spec
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference, make_reference
from mtlsign.watermark.verification.response_bases import MOMENT_INPUTS, placeholder_bases, response_bases

#: Largest number of elements of the inputs from which response bases are computed.
MAX_MOMENT_ELEMENTS = 2**26


def commit_keys(
    template_model: nn.Module,
    base_weights: Tensors,
    architecture: Mapping[str, object],
    input_spec: InputSpec,
    settings: EmbedSettings,
    owner: Identity,
    *,
    bases: Mapping[str, Tensor] | None = None,
) -> tuple[list[KeyOpening], Reference]:
    """Make the reference of W0, and a spec with its signature for each key.

    Args:
        template_model: a network of the architecture, or the part of it that a verifier needs; this part
            receives `base_weights`.
        base_weights: state dict of W0.
        architecture: fields of the spec's `architecture`.
        input_spec: inputs of the primary task; key images have this size up to 64 pixels.
        settings: complete settings.
        owner: the identity that signs.
        bases: result of `measure_response_bases`; a spread head needs it.

    Raises:
        CarrierError, KeyMaterialError, ModelError: a setting does not fit the network or its inputs.
    """
    template_model = template_of(template_model)
    load_tensors(template_model, {name: base_weights[name] for name in template_model.state_dict()})
    _require_readable(template_model, input_spec, field="task")
    taps = _tap_names(template_model, settings.head, settings, input_spec)
    further = [(kind, _default_taps(template_model, kind, input_spec)) for kind in settings.readouts]
    n = settings.key_size or 1024
    key_inputs = _key_inputs(template_model, input_spec, settings)
    carrier = carriers.make(carriers.kind_for(input_spec), n, key_inputs)
    all_taps = tuple(dict.fromkeys([*taps, *(tap for _, names in further for tap in names)]))
    reference = make_reference(template_model, all_taps, _sample(template_model, key_inputs), bases=bases)
    openings = []
    for index in range(settings.keys):
        spec = make_spec(
            name=settings.name, nonce=_nonce(settings, index).hex(), n=n, carrier=carrier, taps=list(taps),
            readouts=[{"head": {"kind": kind}, "taps": list(names), "n": n} for kind, names in further] or 1,
            head=_head_fields(settings), statistic=settings.statistic, normalise="key-batch",
            architecture=dict(architecture), reference=reference.digest,
        )  # fmt: skip
        openings.append(sign_spec(owner, spec))
    return openings, reference


def validate_before_training(
    settings: EmbedSettings,
    architecture: Mapping[str, object],
    input_spec: InputSpec,
    factories: Mapping[str, Factory],
    *,
    log: Callable[[str], None] = lambda _: None,
) -> None:
    """Commit to random weights with a temporary identity, so that invalid settings fail before phase 1.

    Args:
        settings: complete settings; taps, carrier and head are checked.
        architecture: fields of the spec's `architecture`.
        input_spec: inputs of the primary task.
        factories: trusted factories of custom architectures.
        log: called with a sentence on the weights from which phase 1 starts.

    Raises:
        CarrierError, KeyMaterialError, ModelError: a setting does not fit the network or its inputs.
    """
    template_model = architectures.build(architecture, factories=factories)
    if settings.phase1.initial_weights is not None:
        loaded, count = initialize_from_checkpoint(settings.phase1.initial_weights, template_model)
        log(f"phase 1 starts from {loaded} of {count} tensors of {settings.phase1.initial_weights}")
    bases = None
    if needs_response_bases(settings):
        _require_readable(template_model, input_spec, field="task")
        taps = _spread_taps(template_model, settings, input_spec)
        sample = _sample(template_model, input_spec)
        bases = placeholder_bases(template_model, taps, sample, layers=_layer_names(settings))
    openings, reference = commit_keys(
        template_model, cpu_state(template_model), architecture, input_spec, settings, Identity.generate(),
        bases=bases,
    )  # fmt: skip
    WatermarkDetector(openings[0], reference, factories=factories)


def needs_response_bases(settings: EmbedSettings) -> bool:
    """Return whether the key has a spread head."""
    return "spread" in (settings.head, *settings.readouts)


def measure_response_bases(
    model: nn.Module, base_weights: Tensors, task: Task, settings: EmbedSettings
) -> dict[str, Tensor] | None:
    """Compute the response bases of W0 from training inputs; None if no head needs them.

    Args:
        model: a network of the architecture on the task's device; it receives `base_weights`.
        base_weights: state dict of W0.
        task: the primary task. The first samples of its training split are used, without augmentation.
        settings: complete settings.
    """
    if not needs_response_bases(settings):
        return None
    load_tensors(model, base_weights)
    _require_readable(model, task.input_spec, field="task")
    most = max(16, MAX_MOMENT_ELEMENTS // task.input_spec.elements)
    count = min(MOMENT_INPUTS, task.size("train"), most)
    inputs = task.splits["train"].batch(torch.arange(count)).inputs
    taps = _spread_taps(model, settings, task.input_spec)
    return response_bases(model, taps, inputs, layers=_layer_names(settings))


def _sample(model: nn.Module, input_spec: InputSpec) -> Tensor:
    """Return two inputs on the network's device; only their shape and type matter."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return input_spec.sample(device=device)


def _read_error(model: nn.Module, input_spec: InputSpec) -> str | None:
    """Return the network's error for inputs of this size; None if it accepts them."""
    try:
        with eval_mode(model):
            model(_sample(model, input_spec))
    except Exception as error:  # networks raise errors of any class for inputs of another size
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}".removesuffix(": ")
    return None


def _require_readable(model: nn.Module, input_spec: InputSpec, *, field: str) -> None:
    """Raise `ModelError` unless the network accepts inputs of this size."""
    problem = _read_error(model, input_spec)
    if problem is None:
        return
    fix = "Set --carrier-size to its input size" if field == "carrier-size" else "Give data of its input size"
    raise ModelError(f"The network cannot read {input_spec} ({problem}). {fix}.", field=field)


def _key_inputs(model: nn.Module, input_spec: InputSpec, settings: EmbedSettings) -> InputSpec:
    """Return the inputs of the key set: small images, or the task's own if the network accepts no others."""
    key_inputs = carriers.key_input_spec(input_spec, settings.carrier_size)
    if settings.carrier_size is None and _read_error(model, key_inputs) is not None:
        return input_spec
    _require_readable(model, key_inputs, field="carrier-size")
    return key_inputs


def _spread_taps(model: nn.Module, settings: EmbedSettings, input_spec: InputSpec) -> tuple[str, ...]:
    if settings.head == "spread":
        return _tap_names(model, "spread", settings, input_spec)
    return _default_taps(model, "spread", input_spec)


def _default_taps(model: nn.Module, kind: HeadKind, input_spec: InputSpec) -> tuple[str, ...]:
    return architectures.default_taps(model, kind, _sample(model, input_spec))


def _layer_names(settings: EmbedSettings) -> list[str] | None:
    if settings.layers is None:
        return None
    return [name.strip() for name in settings.layers.split(",") if name.strip()]


def _tap_names(
    model: nn.Module, kind: HeadKind, settings: EmbedSettings, input_spec: InputSpec
) -> tuple[str, ...]:
    if settings.taps:
        return tuple(name.strip() for name in settings.taps.split(",") if name.strip())
    return _default_taps(model, kind, input_spec)


def _nonce(settings: EmbedSettings, index: int) -> bytes:
    if settings.insecure_test_key:
        suffix = f" {index}" if index else ""
        return hashlib.sha256(f"mtlsign insecure test nonce {settings.seed}{suffix}".encode()).digest()
    return secrets.token_bytes(32)


def _head_fields(settings: EmbedSettings) -> dict[str, object]:
    if settings.head != "free":
        return {"kind": settings.head}
    return {"kind": "free", "hidden": settings.hidden, "features": settings.features}
