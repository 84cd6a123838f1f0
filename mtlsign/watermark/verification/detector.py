"""Detector of one key: from the tensors of a suspect to its scores."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from mtlsign.errors import ArtifactError, SettingsError
from mtlsign.models import architectures
from mtlsign.models.factories import Factory
from mtlsign.models.untrusted import MappedTensors
from mtlsign.watermark import carriers
from mtlsign.watermark.keys.opening import KeyOpening, keystream, watermark_labels
from mtlsign.watermark.keys.spec import parse_spec
from mtlsign.watermark.verification.alignment import Alignment, Descent, make_aligner
from mtlsign.watermark.verification.conv_model import ConvVerifierModel
from mtlsign.watermark.verification.matching import ContentMatcher
from mtlsign.watermark.verification.model import exact_fp32
from mtlsign.watermark.verification.readouts import (
    FeatureReadout,
    Readout,
    SpreadReadout,
    readout_key,
    require_known_words,
    watermark_dataset,
)
from mtlsign.watermark.verification.reference import Reference
from mtlsign.watermark.verification.response_model import ResponseModel
from mtlsign.watermark.verification.scores import ScoreResult, best_result, checked_scores
from mtlsign.watermark.verification.selection import (
    EarlierKernels,
    KernelOrder,
    SuspectReading,
    SuspectSelector,
)


class WatermarkDetector:
    """Detector of one key: the read-outs with their bits (lines 1 and 2 of Algorithm 1).

    Args:
        opening: spec, public key and signature; every choice of the claimant is hashed into the key.
        reference: W0's reference; its digest must be the spec's.
        head: opened free head (safetensors bytes); None creates a fresh one, as embedding needs.
        device: where scores are computed.
        factories: architectures beyond the allow-list, from the operator's own settings only.

    Attributes:
        readouts: the read-outs in the spec's order; their scores and bits are joined.
        labels: bits of all read-outs, uint8 [N].
        aligner: alignment with W0.
        tensor_names: names of the architecture's tensors.

    Raises:
        KeyMaterialError, ArtifactError, ModelError: the opening, reference or head is damaged or does not
            fit.
    """

    def __init__(
        self,
        opening: KeyOpening,
        reference: Reference,
        *,
        head: bytes | None = None,
        device: torch.device | str = "cpu",
        factories: Mapping[str, Factory] | None = None,
    ) -> None:
        self.key = opening.key()
        self.spec = parse_spec(opening.spec)
        if reference.digest != self.spec.reference:
            raise ArtifactError(
                "The reference is not the one that the spec names. Use the reference of the same kit.",
                field="reference",
            )
        self.device = torch.device(device)
        template_model = architectures.build_template(self.spec.architecture, factories=factories)
        self.readouts: tuple[Readout, ...] = tuple(
            self._make_readout(index, template_model, reference, head)
            for index in range(len(self.spec.readouts))
        )
        self.tensor_names = frozenset(template_model.state_dict())
        self.aligner = make_aligner(
            template_model.cpu(),
            tuple(dict.fromkeys(tap for readout in self.spec.readouts for tap in readout.taps)),
            reference,
            carriers.for_spec(self.spec).sample(),
        )
        self._matcher = ContentMatcher(template_model, self.aligner)
        self._join_readouts()

    def _make_readout(
        self, index: int, template_model: nn.Module, reference: Reference, head: bytes | None
    ) -> Readout:
        """Build read-out `index`, with the inputs of D_WM if it needs them."""
        spec, key = self.spec.readouts[index], readout_key(self.key, index)
        if spec.head.kind == "spread":
            sample = carriers.for_spec(self.spec).sample(device=self.device)
            labels = torch.from_numpy(watermark_labels(key, spec.n)).to(self.device)
            responses = ResponseModel(template_model.to(self.device), spec.taps, reference, sample)
            return SpreadReadout(responses, spec, labels, key)
        inputs, labels = (t.to(self.device) for t in watermark_dataset(self.spec, key, spec.n))
        model = ConvVerifierModel(copy.deepcopy(template_model), spec.taps, reference, inputs[:2])
        require_known_words(self.spec, model)
        return FeatureReadout(model, spec, inputs, labels, key, head if index == 0 else None)

    def _join_readouts(self) -> None:
        """Join labels and shapes of the read-outs."""
        self.labels = torch.cat([readout.labels for readout in self.readouts])
        self.weight_shapes: Mapping[str, tuple[int, ...]] = {
            name: shape for readout in self.readouts for name, shape in readout.model.weight_shapes.items()
        }
        self.kernel_shapes: Mapping[str, tuple[int, ...]] = {
            name: shape for readout in self.readouts for name, shape in readout.model.kernel_shapes.items()
        }
        self.optional_shapes: Mapping[str, tuple[int, ...]] = {
            name: shape for readout in self.readouts for name, shape in readout.model.optional_shapes.items()
        }

    @classmethod
    def joined(
        cls, openings: Sequence[KeyOpening], reference: Reference, **options: Any
    ) -> WatermarkDetector:
        """Return one detector with the read-outs of several keys of one reference, to embed them together.

        Args:
            openings: opened keys with equal heads; only the first may have a trained head.
            reference: W0's reference.
            **options: see the constructor.
        """
        first = cls(openings[0], reference, **options)
        others = [first.with_raw_key(opening.key()) for opening in openings[1:]]
        joined = copy.copy(first)
        joined.readouts = tuple(readout for detector in (first, *others) for readout in detector.readouts)
        joined._join_readouts()
        return joined

    @property
    def feature_readout(self) -> FeatureReadout:
        """First read-out of features; raises `SettingsError` if the key has none."""
        for readout in self.readouts:
            if isinstance(readout, FeatureReadout):
                return readout
        raise SettingsError(
            "The key has no read-out of features on key images. Use a keyed or free head.", field="head"
        )

    @property
    def trained_parameters(self) -> list[Tensor]:
        """Tensors of trained heads."""
        return [tensor for readout in self.readouts for tensor in readout.trained]

    def head_bytes(self) -> bytes | None:
        """Return the bytes of the trained head that the kit stores, or None."""
        first = self.readouts[0]
        return first.head.to_bytes() if isinstance(first, FeatureReadout) else None

    def with_control_key(self, index: int) -> Self:
        """Return the same detector for an unrelated key: other inputs, labels and key-derived heads."""
        return self.with_raw_key(keystream(self.key, b"mtlsign/v1/control/%d" % index, 32))

    def with_raw_key(self, key: bytes) -> Self:
        """Return the same detector for another key of 32 bytes.

        Raises:
            ValueError: the detector was `joined` from several keys.
        """
        if len(self.readouts) != len(self.spec.readouts):
            raise ValueError("a detector of several keys has no control keys")
        other = copy.copy(self)
        other.key = key
        other.readouts = tuple(
            readout.with_key(self.spec, readout_key(key, index))
            for index, readout in enumerate(self.readouts)
        )
        other._join_readouts()
        return other

    def select_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the kernels that the read-outs need, with every correction that needs other tensors."""
        kernels: dict[str, Tensor] = {}
        for readout in self.readouts:
            kernels |= readout.model.select_weights(tensors)
        return kernels

    def read(self, kernels: Mapping[str, Tensor], *, differentiable: bool = False) -> list[Any]:
        """Compute all that is independent of the key, for each read-out.

        Args:
            kernels: result of `select_weights`.
            differentiable: whether gradients pass through the canonical form.
        """
        rounds = 2 if differentiable else 0
        readings: dict[int, Any] = {}
        with exact_fp32():
            for readout in self.readouts:
                if id(readout.model) not in readings:
                    readings[id(readout.model)] = readout.read(kernels, differentiable_rounds=rounds)
        return [readings[id(readout.model)] for readout in self.readouts]

    def score(self, readings: Sequence[Any]) -> Tensor:
        """Compute scores [N] of the result of `read`."""
        with exact_fp32():
            scores = [
                readout.score(reading) for readout, reading in zip(self.readouts, readings, strict=True)
            ]
            return scores[0] if len(scores) == 1 else torch.cat(scores)

    def score_kernels(self, kernels: Mapping[str, Tensor], *, differentiable: bool = False) -> Tensor:
        """Compute scores [N] of kernels on the key set as one batch; see `read` for the arguments."""
        return self.score(self.read(kernels, differentiable=differentiable))

    def score_state_dict(self, tensors: Mapping[str, Tensor]) -> ScoreResult:
        """Compute the scores of untrusted tensors: the best, if the file has the kernels several times."""
        return best_result(self.score_all(tensors), self.labels.cpu())

    def score_all(self, tensors: Mapping[str, Tensor]) -> list[ScoreResult]:
        """Compute the scores of untrusted tensors for each place where the file has the kernels."""
        return self.score_all_keys(tensors, ())[0]

    @torch.no_grad()
    def score_all_keys(
        self, tensors: Mapping[str, Tensor], others: Sequence[Self]
    ) -> list[list[ScoreResult]]:
        """Compute the scores of untrusted tensors under this key and others, which share the reading.

        Args:
            tensors: the suspect's tensors.
            others: detectors made by `with_control_key` or `with_raw_key`.

        Returns:
            For each detector, this one first: a result for each place where the file has the kernels.
        """
        detectors = (self, *others)
        results: list[list[ScoreResult]] = [[] for _ in detectors]
        for reading in self.read_untrusted(tensors):
            for detector, own in zip(detectors, results, strict=True):
                if reading.problem is not None:
                    own.append(ScoreResult(None, reading.problem))
                else:
                    scores = checked_scores(detector.score(reading.values).cpu())
                    own.append(replace(scores, **reading.description()))
        return results

    def read_untrusted(self, tensors: Mapping[str, Tensor]) -> Iterator[SuspectReading]:
        """Compute all that is independent of the key, for each place where the file has the kernels.

        Each place is read in the suspect's own order and, if this differs, aligned with W0, and again without
        mixes of linear channels if these are found. Unless every layer is recognised under its name, the
        kernels are also found by content. A spread read-out tolerates missing kernels.
        """
        selector, earlier, problems = self._selector(), EarlierKernels(), []
        unread, by_names = selector.has_unread(tensors), 0.0
        names_show_layers = complete = named = unnamed = False
        for selected in selector.by_name(tensors):
            if selected.problem is not None:
                problems.append(selected.problem)
                continue
            alignment = self.align(selected)
            descent = self.descent(selected, alignment)
            named, complete = True, complete or not selected.missing
            if not selected.missing:
                by_names = max(by_names, sum(alignment.layer_similarities.values()))
            shows_layers = descent.every_layer and not selected.missing
            if not self.aligner.layers:  # without sketches nothing is recognised
                shows_layers = not selected.missing and not unread
            names_show_layers = names_show_layers or shows_layers
            for order in self._orders_of(selected, alignment, selector.has_own_order(selected.tensors)):
                if order.problem is None and not shows_layers:
                    earlier.add(order.kernels)
                yield replace(self._reading(order), recognized=descent.recognized)
        if not names_show_layers:
            views = selector.by_content(tensors, with_products=unread or not complete)
            for selected, has_own_order in views:
                if selected.problem is not None:
                    problems.append(selected.problem)
                    continue
                alignment = self.align(selected)
                if not selector.exceeds_names(alignment, by_names):
                    continue
                for order in self._orders_of(selected, alignment, has_own_order):
                    unnamed = unnamed or order.problem is None
                    if order.problem is None and earlier.add(order.kernels):
                        reading = self._reading(order)
                        yield replace(reading, recognized=bool(self.aligner.layers), by_content=True)
        if named or not unnamed:
            yield from (SuspectReading((), problem) for problem in problems)

    def _orders_of(
        self, selected: MappedTensors, alignment: Alignment, has_own_order: bool
    ) -> Iterator[KernelOrder]:
        """Yield the kernels in each order in which they are read, see `SuspectSelector.orders`."""
        own = self.select_weights(selected.tensors) if has_own_order else None
        yield from self._selector().orders(selected, alignment, own, self._required_names())

    def align(self, selected: MappedTensors) -> Alignment:
        """Bring selected kernels into W0's order."""
        return self._selector().align(selected)

    def descent(self, selected: MappedTensors, alignment: Alignment) -> Descent:
        """Return whether selected kernels descend from W0, all of them and each under its name."""
        return self._selector().descent(selected, alignment)

    def _reading(self, order: KernelOrder) -> SuspectReading:
        """Return the reading of kernels with W0's shapes and signs."""
        if order.problem is not None:
            return SuspectReading((), order.problem)
        on_device = {name: kernel.to(self.device) for name, kernel in order.kernels.items()}
        missing = tuple(name for name in self.kernel_shapes if name not in order.kernels)
        return SuspectReading(tuple(self.read(on_device)), None, missing, order.similarity)

    def _required_names(self) -> set[str]:
        """Return the kernels of the read-outs that tolerate no missing ones."""
        return {
            name
            for readout in self.readouts
            if not readout.tolerates_missing
            for name in readout.model.kernel_shapes
        }

    def _selector(self) -> SuspectSelector:
        """Return the selector of the tensors that the read-outs need."""
        required = {
            name
            for readout in self.readouts
            if not readout.tolerates_missing
            for name in (*readout.model.weight_shapes, *readout.model.optional_shapes)
        }
        return SuspectSelector(
            aligner=self.aligner,
            matcher=self._matcher,
            tensor_names=self.tensor_names,
            shapes=self.weight_shapes,
            optional=self.optional_shapes,
            tolerated={*self.weight_shapes, *self.optional_shapes} - required,
        )
