"""Forger who holds one suspect and crafts references for it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.label_fitting import gradient_bases, least_squares_bases, spread_readout
from mtlsign.errors import MTLSignError
from mtlsign.storage.safetensors_io import parse_safetensors, serialize_safetensors
from mtlsign.watermark.keys.identity import Identity
from mtlsign.watermark.keys.opening import KeyOpening, sign_spec
from mtlsign.watermark.keys.spec import make_spec
from mtlsign.watermark.verification import evidence
from mtlsign.watermark.verification.detector import WatermarkDetector
from mtlsign.watermark.verification.reference import Reference
from mtlsign.watermark.verification.scores import matching_bits

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Attempt:
    """One crafted reference with the key that is claimed for it.

    Attributes:
        family: first word of the rows.
        method: how the reference was made.
        opening: the key that is opened.
        reference: its bytes.
        head: bytes of a trained head.
        tries: keys from which this one was chosen.
        target_bits: evidence of the key to which the reference was fitted, if no digest bound them; None
            without such a key.
        by_owner: whether the opening is the owner's, signature and all.
    """

    family: str
    method: str
    opening: KeyOpening
    reference: bytes
    head: bytes | None = None
    tries: int = 1
    target_bits: float | None = None
    by_owner: bool = False


class Forger:
    """Holder of a suspect, of the owner's opened claim, and of references that other networks gave.

    Args:
        suspect: tensors of the suspect.
        own: reference of the suspect itself, as if it were W0.
        opening: the owner's opened key.
        reference: the owner's opened reference.
        others: references of other networks of the architecture.
    """

    def __init__(
        self,
        suspect: Mapping[str, Tensor],
        own: Reference,
        opening: KeyOpening,
        reference: Reference,
        others: tuple[Reference, ...],
    ) -> None:
        self.suspect, self.own, self.opening, self.reference = suspect, own, opening, reference
        self.others = others
        self.identity = Identity(hashlib.sha256(b"forger of references").digest(), bytes(32))

    @cached_property
    def fields(self) -> dict[str, object]:
        """Fields of the owner's spec without nonce."""
        return {k: v for k, v in json.loads(self.opening.spec).items() if k not in ("format", "nonce")}

    def sign(self, reference: bytes, nonce: str, **changes: object) -> KeyOpening:
        """Return the forger's opening for a reference; equal arguments give an equal key."""
        fields = self.fields | {"reference": hashlib.sha256(reference).hexdigest(), "name": "forged"}
        digest = hashlib.sha256(nonce.encode()).hexdigest()
        return sign_spec(self.identity, make_spec(**{**fields, "nonce": digest, **changes}))

    def read(self, detector: WatermarkDetector) -> list[object]:
        """Return what the verifier reads from the suspect in the order of the file."""
        with torch.no_grad():
            return detector.read(detector.select_weights(self.suspect))

    def best_key(
        self, reference: bytes, nonce: str, tries: int, **changes: object
    ) -> tuple[KeyOpening, float]:
        """Return the opening with the most evidence among so many nonces, and this evidence.

        Args:
            reference: bytes that do not change.
            nonce: text from which the nonces are derived.
            tries: number of nonces.
            **changes: fields of the spec.
        """
        first = self.sign(reference, f"{nonce} 0", **changes)
        detector = WatermarkDetector(first, Reference.from_bytes(reference))
        reading, best = self.read(detector), (first, -1.0)
        for index in range(tries):
            opening = self.sign(reference, f"{nonce} {index}", **changes)
            bits = own_bits(detector.with_raw_key(opening.key()), reading)
            if bits > best[1]:
                best = opening, bits
        return best


def own_bits(detector: WatermarkDetector, reading: list[object]) -> float:
    """Return the evidence of a key on what was read."""
    with torch.no_grad():
        scores = detector.score(reading).cpu()
    correct = matching_bits(scores, detector.labels)
    if detector.spec.statistic == "weighted":
        return evidence.weighted_tail_bits(evidence.score_weights(scores.numpy()), correct.numpy())
    return evidence.binomial_evidence_bits(int(correct.sum()), len(correct))


def with_bases(reference: Reference, detector: WatermarkDetector, bases: Mapping[str, Tensor]) -> bytes:
    """Return the bytes of a reference with other bases, by name of the kernel."""
    tensors = dict(reference.tensors)
    for layer in spread_readout(detector).model.layers:
        tensors[f"{layer.weight.removesuffix('.weight')}/basis"] = bases[layer.weight]
    return serialize_safetensors(tensors)


class LabelFitter:
    """References that are fitted to the labels of a key which was chosen before them.

    Args:
        forger: holder of the suspect.
        seed: number of the attempt.
    """

    def __init__(self, forger: Forger, seed: int) -> None:
        self.forger, self.seed = forger, seed
        self.target = forger.sign(forger.own.raw_bytes, f"target {seed}")
        self.detector = WatermarkDetector(self.target, forger.own)
        self.kernels = self.detector.select_weights(forger.suspect)

    def fit(self, keys: list[bytes], *, steps: int = 0) -> bytes:
        """Return a reference for the labels of raw keys, by least squares or by steps of Adam."""
        readouts = [spread_readout(self.detector.with_raw_key(key)) for key in keys]
        if steps:
            bases = gradient_bases(readouts[0], self.kernels, steps=steps)
        else:
            bases = least_squares_bases(readouts, self.kernels)
        return with_bases(self.forger.own, self.detector, bases)

    def bits_under(self, reference: bytes, key: bytes) -> float:
        """Return the evidence of a raw key on a fitted reference, as if no digest bound them."""
        opening = self.forger.sign(reference, f"bound {self.seed}")
        detector = WatermarkDetector(opening, Reference.from_bytes(reference))
        return own_bits(detector.with_raw_key(key), self.forger.read(detector))

    def attempt(self, method: str) -> Attempt:
        """Return one attempt: `fixed`, `signed`, `gradient`, `repeated`, `several` or `ground`."""
        forger, key = self.forger, self.target.key()
        attempt = Attempt("fitted", method, self.target, b"")
        if method == "repeated":
            return self._repeated(attempt)
        if method == "several":
            keys = [self.detector.with_control_key(index).key for index in range(4)]
            data = self.fit(keys)
            opening, _ = forger.best_key(data, f"several {self.seed}", 16)
            return replace(
                attempt,
                opening=opening,
                reference=data,
                tries=16,
                target_bits=self.bits_under(data, keys[0]),
            )
        data = self.fit([key], steps=40 if method == "gradient" else 0)
        attempt = replace(attempt, reference=data, target_bits=self.bits_under(data, key))
        if method in ("fixed", "gradient"):
            return attempt
        tries = 256 if method == "ground" else 1
        opening, _ = forger.best_key(data, f"{method} {self.seed}", tries)
        return replace(attempt, opening=opening, tries=tries)

    def _repeated(self, attempt: Attempt) -> Attempt:
        """Fit to the labels of the key that the last fit gave, eight times; keep the best."""
        opening, best, best_bits, target_bits = self.target, attempt, -1.0, math.nan
        for index in range(8):
            data = self.fit([opening.key()])
            target_bits = self.bits_under(data, opening.key())
            opening, bits = self.forger.best_key(data, f"repeated {self.seed} {index}", 1)
            if bits > best_bits:
                best = replace(attempt, opening=opening, reference=data, tries=8, target_bits=target_bits)
                best_bits = bits
        return best


def choose_layers(forger: Forger, seed: int, *, tries: int) -> Attempt | None:
    """Return the list of layers, their sizes and the number of bits with the most evidence; None without one.

    Args:
        forger: holder of the suspect.
        seed: number of the attempt.
        tries: combinations, each with a key of its digest.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = sorted(name.removesuffix("/basis") for name in forger.own.tensors if name.endswith("/basis"))
    best: tuple[float, Attempt] | None = None
    for index in range(tries):
        share = float(torch.rand((), generator=generator)) * 0.9 + 0.1
        chosen = [key for key in keys if float(torch.rand((), generator=generator)) < share] or keys[:1]
        cap = int(torch.randint(1, 257, (), generator=generator))
        n = int(2 ** torch.randint(7, 12, (), generator=generator))
        tensors = {
            name: tensor[:, :, :cap].contiguous() if name.endswith("/basis") else tensor
            for name, tensor in forger.own.tensors.items()
            if not name.endswith("/basis") or name.removesuffix("/basis") in chosen
        }
        data = serialize_safetensors(tensors)
        statistic = ("count", "weighted")[index % 2]
        changes = {"n": n, "statistic": statistic, "carrier": _carrier(forger, n)}
        try:
            opening, bits = forger.best_key(data, f"layers {seed} {index}", 1, **changes)
        except MTLSignError:
            continue  # fewer coordinates than bits
        if best is None or bits > best[0]:
            best = bits, Attempt("layers", "best list and size", opening, data, tries=tries)
    return None if best is None else best[1]


def _carrier(forger: Forger, n: int) -> dict[str, object]:
    fields = forger.fields["carrier"]
    assert isinstance(fields, dict)
    return fields | {"digits": len(str(2 ** (3 * math.ceil(math.log2(n)))))}


def replays(forger: Forger) -> Iterator[Attempt]:
    """Yield claims with foreign references and openings, without end."""
    owner, data, index = forger.opening, forger.reference.raw_bytes, 0
    foreign = Attempt("replayed", "", owner, data)
    while True:
        other = forger.others[index % len(forger.others)].raw_bytes
        nonce = f"replay {index}"
        yield replace(foreign, method="owner's reference, new key", opening=forger.sign(data, nonce))
        opening, _ = forger.best_key(data, nonce, 64)
        yield replace(foreign, method="owner's reference, best of 64 keys", opening=opening, tries=64)
        spec = owner.spec if index == 0 else owner.spec + b" " * index
        yield replace(foreign, method="owner's spec, own signature", opening=sign_spec(forger.identity, spec))
        yield replace(foreign, method="other network's reference, new key", reference=other,
                      opening=forger.sign(other, nonce))  # fmt: skip
        yield replace(foreign, method="owner's key, other reference", reference=other)
        yield replace(foreign, method="owner's key, reference written in another way",
                      reference=_written_again(data, index))  # fmt: skip
        key = KeyOpening(owner.spec, forger.identity.public_key, owner.signature)
        yield replace(foreign, method="owner's key under another public key", opening=key)
        signature = bytearray(owner.signature)
        signature[index % 64] ^= 1 << (index % 8)
        key = KeyOpening(owner.spec, owner.public_key, bytes(signature))
        yield replace(foreign, method="owner's key, changed signature", opening=key)
        yield replace(foreign, method="owner's whole opening", by_owner=True)
        index += 1


def _written_again(data: bytes, index: int) -> bytes:
    """Return other bytes with the same tensors: further spaces after the header."""
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size] + b" " * 8 * (index + 1)
    changed = len(header).to_bytes(8, "little") + header + data[8 + size :]
    assert parse_safetensors(changed).keys() == parse_safetensors(data).keys()
    return changed
