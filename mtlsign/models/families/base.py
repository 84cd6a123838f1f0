"""Protocol of an architecture family, and the types of its fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor, nn

from mtlsign.errors import ModelError
from mtlsign.models.factories import Factory


@dataclass(frozen=True)
class IntegerField:
    """Whole number of an architecture, from `low` to `high`."""

    low: int
    high: int
    required: bool = True

    def check(self, name: str, value: object) -> None:
        """Raise `ModelError` unless `value` is a whole number within the limits."""
        if type(value) is not int or not self.low <= value <= self.high:
            raise ModelError(
                f"{value!r:.40} is not a whole number from {self.low} to {self.high}. "
                "Give a number within these limits.",
                field=name,
            )


@dataclass(frozen=True)
class ChoiceField:
    """Field of an architecture with a fixed set of values."""

    choices: tuple[str, ...]
    required: bool = True

    def check(self, name: str, value: object) -> None:
        """Raise `ModelError` unless `value` is one of the choices."""
        if value not in self.choices:
            raise ModelError(
                f"{value!r:.40} is not supported. Use one of {', '.join(self.choices)}.", field=name
            )


Field = IntegerField | ChoiceField

CHANNELS = IntegerField(1, 16)
CLASSES = IntegerField(1, 65_536)
VOCABULARY = IntegerField(3, 1_000_000)
EMBEDDING = IntegerField(2, 4096)


class Translation(NamedTuple):
    """This package's name of another library's tensor, its prefix kept.

    Attributes:
        target: the name. Of one spelling, no two names have the same target.
        spelling: which of the other libraries' spellings the name has; None if several have it.
    """

    target: str
    spelling: str | None


class ArchitectureFamily(Protocol):
    """Set of networks that are described by the same fields.

    A network is described by an architecture: the JSON object that the spec stores under `architecture`. It
    holds the name `arch` and the family's fields. A verifier builds the network from it without the owner's
    code.

    Attributes:
        usage: names of the family's architectures, as error messages show them.
        fields: the fields besides `arch`, in the order in which they are checked; None if any are allowed.
        inputs: kind of inputs that the networks read.
        outputs: labels of a whole input (or of its tokens), the instances of objects in it, or new images.
    """

    usage: str
    fields: Mapping[str, Field] | None
    inputs: Literal["image", "text", "any"] = "image"
    outputs: Literal["labels", "instances", "images", "any"] = "labels"

    def includes(self, arch: str) -> bool:
        """Return whether `arch` names a network of this family."""

    def options(self, *, width: int, stem: str, size: int | None) -> dict[str, object]:
        """Return those of the given options that this family records, besides channels and classes."""

    def has_fixed_size(self, arch: str) -> bool:
        """Return whether the network is built for images of one `size`."""
        return False

    def build(self, arch: str, options: Mapping[str, object], factories: Mapping[str, Factory]) -> nn.Module:
        """Build the network with random weights from torch's global generator; download nothing.

        Args:
            arch: architecture name.
            options: checked fields without `arch`.
            factories: trusted factories by path; only custom networks use them.
        """

    def build_template(
        self, arch: str, options: Mapping[str, object], factories: Mapping[str, Factory]
    ) -> nn.Module:
        """Build the part of the network that carries a watermark, which is all that a verifier needs.

        Args:
            arch: architecture name.
            options: checked fields without `arch`.
            factories: trusted factories by path; only custom networks use them.
        """
        return self.build(arch, options, factories)

    def stages(self, model: nn.Module) -> Sequence[str]:
        """Return the module names of the model's stages in execution order; empty if they are unknown."""
        return ()

    def translation_of(self, name: str) -> Translation | None:
        """Return the family's name of another library's tensor; None for any other name."""
        return None

    def pretrained_weights(self, arch: str, options: Mapping[str, object]) -> Mapping[str, Tensor]:
        """Return pretrained weights by tensor name. Raises `ModelError` if there are none."""
        raise ModelError(
            f"'pretrained' supports timm/NAME models only, not {arch[:80]!r}. Give a checkpoint file.",
            field="weights",
        )


def check_fields(family: ArchitectureFamily, arch: str, architecture: Mapping[str, object]) -> None:
    """Raise `ModelError` unless `architecture` has exactly the family's fields, within their limits."""
    if family.fields is None:
        return
    required = {"arch", *(name for name, field in family.fields.items() if field.required)}
    if set(architecture) - {"arch", *family.fields} or required - set(architecture):
        raise ModelError(
            f"{arch!r} has exactly the fields {', '.join(sorted(required))}. Correct the architecture.",
            field="architecture",
        )
    for name, field in family.fields.items():
        if name in architecture:
            field.check(name, architecture[name])
