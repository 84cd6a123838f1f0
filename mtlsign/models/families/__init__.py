"""Registry of architecture families: the allow-list of networks that a spec can name."""

from __future__ import annotations

from mtlsign.errors import ModelError
from mtlsign.models.families.base import ArchitectureFamily, Translation
from mtlsign.models.families.custom import PREFIX, RENAMED_PREFIX, CustomFamily
from mtlsign.models.families.detector import DetectorFamily, TimmDetectorFamily
from mtlsign.models.families.generator import GeneratorFamily
from mtlsign.models.families.recurrent import RecurrentFamily
from mtlsign.models.families.resnet import ResNetFamily
from mtlsign.models.families.timm import TimmFamily
from mtlsign.models.families.transformer import TransformerFamily

__all__ = ["FAMILIES", "ArchitectureFamily", "Translation", "family_of", "translation_of"]

#: Searched in this order.
FAMILIES: tuple[ArchitectureFamily, ...] = (
    ResNetFamily(),
    RecurrentFamily(),
    TransformerFamily(),
    DetectorFamily(),
    TimmDetectorFamily(),
    TimmFamily(),
    GeneratorFamily(),
    CustomFamily(),
)


def family_of(arch: str) -> ArchitectureFamily:
    """Return the family of an architecture name. Raises `ModelError` for a name that no family includes."""
    for family in FAMILIES:
        if family.includes(arch):
            return family
    if arch.startswith(RENAMED_PREFIX):
        raise ModelError(
            f"The prefix {RENAMED_PREFIX!r} of architectures was renamed. Use {PREFIX!r}.", field="model"
        )
    names = ", ".join(family.usage for family in FAMILIES)
    raise ModelError(f"Unknown architecture {arch[:80]!r}. Use one of {names}.", field="model")


def translation_of(name: str) -> Translation | None:
    """Return this package's name of another library's tensor, its prefix kept; None for any other name."""
    translations = (family.translation_of(name) for family in FAMILIES)
    return next((translation for translation in translations if translation is not None), None)
