"""Alignment of a suspect's channels and inputs with W0, from the reference's sketch (docs/decisions/0018).

An attacker can permute the channels of a network, add channels without effect, and turn, mirror or mix its
inputs, all without changing what it computes. `Aligner.align` brings kernels back into W0's order. It reads
neither the key nor batch-norm values, so that the null distribution of the scores stays exact.
"""

from mtlsign.watermark.verification.alignment.aligner import Aligner, Alignment

__all__ = ["Aligner", "Alignment"]
