"""Suspects read by content: tensors matched to W0's layers by shapes and sketches (docs/decisions/0022).

An attacker can rename the tensors of a file and store them with other axes, or as factors, without changing
what the network computes. Matching reads neither names of tensors nor the key, so that the null distribution
of the scores stays exact; each reading that it adds costs evidence.
"""

from mtlsign.watermark.verification.matching.matcher import ContentMatcher, ContentView

__all__ = ["ContentMatcher", "ContentView"]
