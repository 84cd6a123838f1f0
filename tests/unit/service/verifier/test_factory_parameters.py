"""Parameters of the operator's factory: only declared whole numbers reach it."""

from __future__ import annotations

import pytest

from mtlsign.errors import SettingsError
from mtlsign.service.problems import Problem
from mtlsign.service.verifier.factory_parameters import check_factory_parameters, declared_parameters

ARCH = "custom/package.module:function"


@pytest.mark.parametrize(
    ("fields", "declarations"),
    [
        ({"checkpoint": "/etc/shadow"}, ()),
        ({"checkpoint": "/etc/shadow"}, ("checkpoint=1:9",)),
        ({"width": 2**40}, ("width=1:128",)),
        ({"width": True}, ("width=0:128",)),
        ({"width": 64}, ("depth=1:128",)),
        ({"classes": 2**40}, ()),
    ],
)
def test_undeclared_parameter_of_factory_is_refused(
    fields: dict[str, object], declarations: tuple[str, ...]
) -> None:
    with pytest.raises(Problem, match="architecture-refused"):
        check_factory_parameters({"arch": ARCH, **fields}, declarations)


def test_declared_parameter_of_factory_is_accepted() -> None:
    fields = {"arch": ARCH, "channels": 3, "classes": 10, "size": 32, "width": 64}
    check_factory_parameters(fields, ("width=1:128",))
    check_factory_parameters({"arch": "resnet18", "stem": "cifar"}, ())  # its family has its own limits


@pytest.mark.parametrize("text", ["width", "width=1", "width=9:1", "width=-1:3", "a b=1:2"])
def test_invalid_declaration_is_a_settings_error(text: str) -> None:
    with pytest.raises(SettingsError):
        declared_parameters([text])
