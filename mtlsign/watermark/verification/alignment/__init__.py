"""Alignment of a suspect's channels and inputs with W0, from the reference's sketch (docs/decisions/0018).

An attacker can permute the channels of a network, add channels without effect, and turn, mirror or mix its
inputs, all without changing what it computes. `Aligner.align` brings kernels back into W0's order. It reads
neither the key nor batch-norm values, so that the null distribution of the scores stays exact.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from mtlsign.models.taps import tapped_layers
from mtlsign.watermark.verification.alignment.aligner import Aligner
from mtlsign.watermark.verification.alignment.recurrent import RecurrentAligner
from mtlsign.watermark.verification.alignment.result import Alignment, Descent
from mtlsign.watermark.verification.alignment.transformer import TransformerAligner
from mtlsign.watermark.verification.reference import Reference
from mtlsign.watermark.verification.response_model import attention_products

__all__ = ["Aligner", "Alignment", "Descent", "RecurrentAligner", "TransformerAligner", "make_aligner"]


def make_aligner(
    template_model: nn.Module, taps: Sequence[str], reference: Reference, sample: Tensor
) -> Aligner | RecurrentAligner | TransformerAligner:
    """Return the aligner for an architecture.

    It is that of recurrent layers or of attention layers if the network has some, else that of channels.

    Args:
        template_model: the architecture; its own values are never used.
        taps: module names.
        reference: W0's reference.
        sample: inputs of the network's geometry.

    Raises:
        ModelError: a tap does not exist.
        ArtifactError: the reference does not fit the architecture.
    """
    products = attention_products(template_model, taps, sample, reference)
    if products is not None:
        return TransformerAligner(template_model, taps, reference, sample, products)
    recurrent = any(layer.kind == "recurrent" for layer in tapped_layers(template_model, taps, sample))
    return (RecurrentAligner if recurrent else Aligner)(template_model, taps, reference, sample)
