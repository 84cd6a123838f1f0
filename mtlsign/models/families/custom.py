"""Networks of the caller's own factories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import nn
from torch.nn.parameter import is_lazy

from mtlsign.errors import ModelError
from mtlsign.models.detectors import template_of
from mtlsign.models.factories import FACTORY_PATH, Factory, call_factory
from mtlsign.models.families.base import ArchitectureFamily, Field
from mtlsign.models.preparation import prepare_module, unwrapped

#: Prefix of architecture names in the spec, which is part of the wire format.
PREFIX = "custom/"
#: Old prefix, which is rejected with the new one.
RENAMED_PREFIX = "own/"


def factory_path(arch: str) -> str | None:
    """Return the factory path of a custom architecture name; None for other families."""
    return arch[len(PREFIX) :] if arch.startswith(PREFIX) else None


class CustomFamily(ArchitectureFamily):
    """`custom/package.module:function`, with the fields that the factory accepts."""

    usage = f"{PREFIX}package.module:function"
    fields: Mapping[str, Field] | None = None
    inputs: Literal["image", "text", "any"] = "any"
    outputs: Literal["labels", "instances", "images", "any"] = "any"

    def includes(self, arch: str) -> bool:
        """Return whether `arch` has the form of a custom architecture name."""
        path = factory_path(arch)
        return path is not None and FACTORY_PATH.fullmatch(path) is not None

    def options(self, *, width: int, stem: str, size: int | None) -> dict[str, object]:
        """Return the image size, if it is given."""
        return {} if size is None else {"size": size}

    def build(self, arch: str, options: Mapping[str, object], factories: Mapping[str, Factory]) -> nn.Module:
        """Call the trusted factory of the architecture, and prepare the network as the owner did.

        Raises:
            ModelError: the factory is not in `factories`, raises an error or returns no network.
        """
        path = factory_path(arch)
        factory = factories.get(path) if path is not None else None
        if path is None or factory is None:
            raise ModelError(
                f"The factory {path!r} is not registered. The operator must name it in the settings, "
                "because factories are never imported from a kit, claim or config.",
                field="model",
            )
        model = call_factory(path, factory, options, field="model")
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"The factory {path!r} returned {type(model).__name__}. It must return a torch.nn.Module.",
                field="model",
            )
        model = unwrapped(model)
        if not any(is_lazy(parameter) for parameter in model.parameters()):
            prepare_module(model)
        return model

    def build_template(
        self, arch: str, options: Mapping[str, object], factories: Mapping[str, Factory]
    ) -> nn.Module:
        """Call the trusted factory, and keep only the body of a detector."""
        return template_of(self.build(arch, options, factories))
