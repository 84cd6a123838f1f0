"""Parameters that a claim may pass to the operator's trusted factory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mtlsign.errors import ModelError, SettingsError
from mtlsign.models.families.base import CHANNELS, CLASSES, EMBEDDING, VOCABULARY, IntegerField
from mtlsign.models.families.custom import factory_path
from mtlsign.service.problems import Problem

_DECLARATION = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,63})=([0-9]{1,12}):([0-9]{1,12})")
#: Parameters of claims on networks for images and texts, which the owner's jobs write.
_ALWAYS = {
    "channels": CHANNELS,
    "classes": CLASSES,
    "size": IntegerField(1, 4096),
    "vocabulary": VOCABULARY,
    "embedding": EMBEDDING,
}


def declared_parameters(declarations: Sequence[str]) -> dict[str, IntegerField]:
    """Parse the setting `factory_parameters`, NAME=LOW:HIGH. Raises SettingsError."""
    parameters = dict(_ALWAYS)
    for text in declarations:
        match = _DECLARATION.fullmatch(text)
        if match is None or int(match[2]) > int(match[3]):
            message = f"{text[:80]!r} declares no parameter. Write NAME=LOW:HIGH with whole numbers."
            raise SettingsError(message, field="factory-parameters")
        parameters[match[1]] = IntegerField(int(match[2]), int(match[3]))
    return parameters


def check_factory_parameters(architecture: Mapping[str, object], declarations: Sequence[str]) -> None:
    """Check the parameters of a custom architecture before its factory is called.

    Args:
        architecture: the `architecture` of a claim's spec.
        declarations: the setting `factory_parameters`.

    Raises:
        Problem: `architecture-refused` for a parameter that the operator has not declared, or outside its
            limits.
    """
    if factory_path(str(architecture.get("arch"))) is None:
        return
    parameters = declared_parameters(declarations)
    for name, value in architecture.items():
        if name == "arch":
            continue
        if name not in parameters:
            detail = (
                f"The operator has not declared the parameter {name[:64]!r} of the factory. "
                "Ask the operator to add it to factory_parameters."
            )
            raise Problem("architecture-refused", detail)
        try:
            parameters[name].check(name, value)
        except ModelError as error:
            raise Problem("architecture-refused", str(error)) from None
