"""What an owner does with a kit: check models against it."""

from __future__ import annotations

from mtlsign import backbone
from mtlsign.artifact import Kit, read_kit, read_model
from mtlsign.key import load_or_create_identity, read_passphrase
from mtlsign.reference import Reference
from mtlsign.sealing import Secret
from mtlsign.settings import VerifySettings
from mtlsign.tensors import read_tensors
from mtlsign.verification import Probe, Verdict, verify


def probe_of(kit: Kit) -> Probe:
    """The kit's test. On the owner's side only: an own architecture is imported by the name in the owner's spec."""
    arch = str(kit.opening.parse().graph["arch"])
    factories = {arch[4:]: backbone.load_factory(arch[4:])} if arch.startswith("own/") else {}
    return Probe(kit.opening, Reference.from_bytes(kit.reference), head=kit.head, factories=factories)


def verify_with_kit(s: VerifySettings) -> list[Verdict]:
    """A verdict for each model, in order.

    Raises:
        KeyMaterialError: the kit does not open. ArtifactError, ModelError, StorageError: a model cannot be fetched.
    """
    if s.kit_passphrase_file is not None:
        secret = Secret.from_passphrase(read_passphrase(s.kit_passphrase_file))
    else:
        secret = Secret.from_kit_key(load_or_create_identity(s.owner, s.passphrase_file)[0].kit_key)
    kit = read_kit(s.kit, secret, endpoint=s.endpoint)
    probe, w0 = probe_of(kit), read_tensors(kit.w0)
    verdicts = []
    for place in s.models:
        model = read_model(place, endpoint=s.endpoint)
        verdicts.append(
            verify(
                model.tensors, probe, bits=s.bits, gamma=s.gamma, controls=s.controls, w0=w0, model_digest=model.digest
            )
        )
    return verdicts
