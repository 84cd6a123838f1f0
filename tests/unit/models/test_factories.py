from __future__ import annotations

import json

import pytest

from mtlsign.errors import ModelError
from mtlsign.models.factories import load_factory, trusted_factories


@pytest.mark.parametrize(
    "path", ["", "json", "json:", "json:dumps:x", "json:__doc__", "no_such_package:f", "a b:c"]
)
def test_load_factory_with_unusable_path_raises_model_error(path: str) -> None:
    with pytest.raises(ModelError):
        load_factory(path)


def test_load_factory_returns_function() -> None:
    assert load_factory("json:dumps") is json.dumps


@pytest.mark.parametrize("field", ["model", "task"])
def test_load_factory_with_unknown_function_names_setting(field: str) -> None:
    with pytest.raises(ModelError, match=f"^{field}: "):
        load_factory("json:dumpz", field=field)


def test_trusted_factories_accept_another_name_of_the_spec() -> None:
    path = "json:dumps"
    assert trusted_factories(None) == {}
    assert trusted_factories(path) == {path: json.dumps}
    assert trusted_factories(f"__main__:Net={path}") == {"__main__:Net": json.dumps}
    with pytest.raises(ModelError, match=r"^trusted-factory: "):
        trusted_factories("__main__:Net=")
