"""Embedding into a module of the caller, in this process and on the caller's own objects."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtlsign.config.embed import EmbedSettings
from mtlsign.errors import ModelError, SettingsError
from mtlsign.models.activation_checkpointing import checkpointed
from mtlsign.models.families import custom
from mtlsign.models.loading import (
    cpu_state,
    custom_architecture_name,
    load_adapter,
    require_same_architecture,
)
from mtlsign.models.preparation import Preparation, prepared, unwrapped
from mtlsign.models.taps import eval_mode
from mtlsign.tasks import Task, from_loaders
from mtlsign.tasks.outputs import LogitsFunction, default_logits
from mtlsign.watermark.embedding.advice import public_base_warning
from mtlsign.watermark.embedding.commitment import commit_keys, measure_response_bases
from mtlsign.watermark.embedding.memory import check_memory
from mtlsign.watermark.embedding.phase1 import train_clean_model
from mtlsign.watermark.embedding.pipeline import ProgressCallback, phase2_result
from mtlsign.watermark.embedding.result import EmbeddingResult, build_result
from mtlsign.watermark.embedding.worker import SingleProcessContext
from mtlsign.watermark.keys.identity import Identity, load_or_create_identity
from mtlsign.watermark.verification.detector import WatermarkDetector


def embed(
    module: nn.Module,
    data: Task | Mapping[str, Any],
    *,
    trained: bool = False,
    identity: Identity | None = None,
    architecture: Mapping[str, object] | None = None,
    loss: Callable[..., Tensor] | None = None,
    metric: Callable[..., Any] | None = None,
    logits_of: LogitsFunction | None = None,
    classes: int | None = None,
    device: torch.device | str = "cpu",
    on_progress: ProgressCallback | None = None,
    **options: Any,
) -> EmbeddingResult:
    """Embed a watermark into `module` in this process, also inside a running Ray.

    The network inside wrappers such as torch.compile is trained in float32, and saved in its own types.
    Weight norm, spectral norm and other parametrizations are replaced by plain weights.

    Args:
        module: any network; it is changed in place and holds the marked weights afterwards.
        data: a `Task`, or loaders {"train", "test"[, "validation", "attacker", "inner"]} of (x, y) batches
            or of mappings, such as {"pixel_values", "labels"} or {"input_ids", "labels"}.
        trained: whether the module is trained already; phase 1 is then skipped. It is the base of `adapter`.
        identity: the owner; by default that of this machine, created if there is none.
        architecture: one from the allow-list (`architectures.architecture_for`), which any verifier can
            build, or {"arch": "custom/package.module:function"}. By default it has the name of the class.
        loss: mean loss of (outputs, y), with loaders; see `from_loaders` for the defaults.
        metric: one number per sample of (outputs, y), with loaders; accuracy by default.
        logits_of: (outputs of the module) -> logits, with loaders; `default_logits` by default.
        classes: outputs of the network, with loaders; by default as many as there are labels.
        device: where to train.
        on_progress: called with rows of progress.
        **options: any of `EmbedSettings`.

    Returns:
        The marked model, the owner kit, the verdict and the metrics.

    Raises:
        MTLSignError: a setting, the task or the model is invalid.
    """
    network = unwrapped(module)
    name = custom_architecture_name(type(network))
    model_name = str((architecture or {}).get("arch", name))
    settings = EmbedSettings.of({"task": "custom", "model": model_name, **options}).with_defaults()
    with torch.inference_mode(False), torch.enable_grad(), prepared(network) as preparation:
        if preparation.materialised:
            warnings.warn(_materialised_message(preparation.materialised), stacklevel=2)
        if architecture is not None:
            require_same_architecture(network, architecture)
        task = data if isinstance(data, Task) else from_loaders(
            data, loss=loss, metric=metric, logits_of=logits_of, classes=classes, seed=settings.seed,
            count_outputs=lambda inputs: _count_outputs(network, inputs, logits_of or default_logits),
            vocabulary=_vocabulary(network),
        )  # fmt: skip
        fields = architecture or {"arch": name, **task.input_spec.architecture_fields}
        owner = identity or load_or_create_identity(settings.owner, settings.passphrase_file)[0]
        worker = SingleProcessContext(device, on_progress=on_progress)
        return _embed(network, task, settings, owner, dict(fields), worker, preparation, trained)


def _embed(
    network: nn.Module,
    task: Task,
    settings: EmbedSettings,
    owner: Identity,
    fields: Mapping[str, object],
    worker: SingleProcessContext,
    preparation: Preparation,
    trained: bool,
) -> EmbeddingResult:
    """Run both phases on a prepared network; see `embed` for the arguments."""
    template_model = _copied(network).cpu()
    path = custom.factory_path(str(fields["arch"]))
    factories = {} if path is None else {path: lambda: copy.deepcopy(template_model)}
    checked = partial(check_memory, settings, fields, task.input_spec, worker, factories=factories)
    rows = []
    adapter = load_adapter(settings, network.state_dict())
    if adapter is not None:
        if not trained:
            raise SettingsError("The adapter is trained already. Pass trained=True.", field="adapter")
        network.load_state_dict(adapter.merged(network.state_dict()))
    if not trained:
        with checkpointed(network, enabled=checked(phase=1)):
            rows = train_clean_model(network, task, settings, worker)
    base_weights = cpu_state(network)
    warning = public_base_warning(base_weights, settings)
    if warning is not None:
        warnings.warn(warning, stacklevel=3)
    bases = measure_response_bases(template_model, base_weights, task, settings)
    openings, reference = commit_keys(
        template_model, base_weights, fields, task.input_spec, settings, owner, bases=bases
    )
    detector = WatermarkDetector.joined(openings, reference, device=worker.device, factories=factories)
    with checkpointed(network, enabled=checked(phase=2)):
        phase2 = phase2_result(network, task, detector, settings, worker)
    phase2 = replace(phase2, tensors=preparation.in_original_types(phase2.tensors))
    return build_result(
        base_weights, rows, openings, reference, phase2, settings, factories=factories, warning=warning
    )


def _copied(network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except Exception as error:
        raise ModelError(
            f"The module cannot be copied ({type(error).__name__}: {' '.join(str(error).split())[:120]}). "
            "Remove attributes that hold results of a computation.",
            field="module",
        ) from None


def _count_outputs(network: nn.Module, inputs: Tensor, logits_of: LogitsFunction) -> int:
    """Return the number of classes or values that the network returns."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    with eval_mode(network):
        logits = logits_of(network(inputs.to(device)))
    return int(logits.shape[1]) if logits.ndim > 1 else 1


def _vocabulary(network: nn.Module) -> int | None:
    """Return the number of token ids that the first embedding of a network has; None without one."""
    embeddings = (module for module in network.modules() if isinstance(module, nn.Embedding))
    return next((embedding.num_embeddings for embedding in embeddings), None)


def _materialised_message(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return (
        f"{len(names)} parametrized weights, such as {shown}, were replaced by plain weights, so that the "
        "saved file has plain names. Load it into the network without parametrizations."
    )
