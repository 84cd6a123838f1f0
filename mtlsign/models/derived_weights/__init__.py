"""Kernels that a file stores in another form than plain floats. The rules are in docs/format.md."""

from mtlsign.models.derived_weights.mapping import DerivedWeights

__all__ = ["DerivedWeights"]
