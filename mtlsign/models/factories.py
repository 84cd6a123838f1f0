"""mtlsign.models.factories."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mtlsign.errors import ModelError, MTLSignError

Factory = Callable[..., nn.Module]


FACTORY_PATH = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*")


def load_factory(path: str, *, field: str = "factory") -> Callable[..., Any]:
    """Import `package.module:function` — the owner's side only, because importing runs code.

    Raises ModelError, which names the setting `field`, when the path is malformed, not importable, or names
    nothing callable.
    """
    if not isinstance(path, str) or not FACTORY_PATH.fullmatch(path):
        raise ModelError(f"{str(path)[:80]!r} is no factory: write package.module:function", field=field)
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ModelError(
            f"cannot import {module_name!r} ({type(error).__name__}: {str(error)[:120]}): "
            "install it or put its folder on PYTHONPATH",
            field=field,
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        names = [n for n in dir(module) if callable(getattr(module, n, None))]
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "define it as a function"
        raise ModelError(f"{module_name!r} has no callable {name!r}: {hint}", field=field)
    return factory  # type: ignore[no-any-return]


def call_factory(path: str, factory: Callable[..., Any], options: Mapping[str, object], *, field: str) -> Any:
    """What somebody's own factory gives for `options`.

    Raises ModelError, which names the setting `field` and the line, for whatever the factory raises.
    """
    try:
        return call_with_accepted_kwargs(factory, options)
    except MTLSignError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ModelError(
            f"the factory {path!r} raised {type(error).__name__}: {str(error)[:200]} "
            f"({last.filename.rpartition('/')[2]}, line {last.lineno}): mend it",
            field=field,
        ) from error


def call_with_accepted_kwargs(function: Callable[..., Any], options: Mapping[str, object]) -> Any:
    """Call `function` with those of `options` that its signature names; `**kwargs` names none of them."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return function()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return function(**{name: value for name, value in options.items() if name in named})
