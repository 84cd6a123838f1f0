"""What an owner does with a kit: check models against it."""

from __future__ import annotations

import torch

from mtlsign import backbone
from mtlsign.artifact import Kit, read_kit, read_model
from mtlsign.errors import ModelError
from mtlsign.key import load_or_create_identity, read_passphrase
from mtlsign.reference import Reference
from mtlsign.sealing import Secret
from mtlsign.settings import VerifySettings
from mtlsign.settings_attack import AttackSettings
from mtlsign.tensors import read_tensors
from mtlsign.verification import Probe, Verdict, verify


def open_kit(s: VerifySettings | AttackSettings, place: str) -> Kit:
    """Open a kit with the passphrase or owner identity that the settings name.

    Raises:
        KeyMaterialError: the kit does not open. ArtifactError, StorageError: it cannot be fetched.
    """
    if s.kit_passphrase_file is not None:
        secret = Secret.from_passphrase(read_passphrase(s.kit_passphrase_file))
    else:
        secret = Secret.from_kit_key(load_or_create_identity(s.owner, s.passphrase_file)[0].kit_key)
    return read_kit(place, secret, endpoint=s.endpoint)


def probe_of(kit: Kit, factory: str | None = None, *, device: torch.device | str = "cpu") -> Probe:
    """The kit's test. An own architecture is imported only if the caller names it: a kit may come from
    anybody.

    Raises:
        ModelError: the spec wants an architecture beyond the allow-list, and `factory` is not it.
    """
    factories = {factory: backbone.load_factory(factory)} if factory else {}
    arch = str(kit.opening.parse().graph["arch"])
    if arch.startswith("own/") and arch[4:] not in factories:
        raise ModelError(
            f"the kit is for an own architecture; if you trust that code: --factory {arch[4:]}",
            field="factory",
        )
    reference = Reference.from_bytes(kit.reference)
    return Probe(kit.opening, reference, head=kit.head, device=device, factories=factories)


def verify_with_kit(s: VerifySettings) -> list[Verdict]:
    """A verdict for each model, in order.

    Raises:
        KeyMaterialError: the kit does not open. ArtifactError, ModelError, StorageError: a model cannot be
        fetched.
    """
    kit = open_kit(s, s.kit)
    probe, w0 = probe_of(kit, s.factory), read_tensors(kit.w0)
    verdicts = []
    for place in s.models:
        model = read_model(place, endpoint=s.endpoint)
        verdicts.append(
            verify(
                model.tensors,
                probe,
                bits=s.bits,
                gamma=s.gamma,
                controls=s.controls,
                w0=w0,
                model_digest=model.digest,
            )
        )
    return verdicts
