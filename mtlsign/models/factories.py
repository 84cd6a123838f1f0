"""Factories of the caller: import by path, and calls with the options that they accept."""

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
    """Import `package.module:function`.

    Importing runs code. Call this only with a path that the owner or operator has given.

    Args:
        path: the factory's path.
        field: the setting that holds the path, for error messages.

    Raises:
        ModelError: the path is malformed, cannot be imported, or names nothing callable.
    """
    if not isinstance(path, str) or not FACTORY_PATH.fullmatch(path):
        raise ModelError(
            f"{str(path)[:80]!r} is not the path of a factory. Write package.module:function.", field=field
        )
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ModelError(
            f"Python cannot import {module_name!r} ({type(error).__name__}: {str(error)[:120]}). "
            "Install it or put its folder on PYTHONPATH.",
            field=field,
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        names = [n for n in dir(module) if callable(getattr(module, n, None))]
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"Use a similar name, such as {', '.join(near)}." if near else "Define it as a function."
        raise ModelError(f"{module_name!r} has no callable {name!r}. {hint}", field=field)
    return factory  # type: ignore[no-any-return]


def trusted_factories(text: str | None, *, field: str = "trusted-factory") -> dict[str, Factory]:
    """Import the factory that a caller trusts; return it by the architecture's path in the spec.

    Args:
        text: `package.module:function`, or `NAME=package.module:function` if the spec has another NAME, as
            for a class of a notebook; None for no factory.
        field: the setting that holds the text, for error messages.

    Raises:
        ModelError: as `load_factory`.
    """
    if not text:
        return {}
    name, _, path = text.rpartition("=")
    return {name or path: load_factory(path, field=field)}


def call_factory(path: str, factory: Callable[..., Any], options: Mapping[str, object], *, field: str) -> Any:
    """Call a factory with those of `options` that it accepts, and return its result.

    Args:
        path: the factory's path, for error messages.
        factory: the callable.
        options: keyword arguments.
        field: the setting that holds the path, for error messages.

    Raises:
        ModelError: the factory raised an error; the message names its line.
    """
    try:
        return call_with_accepted_kwargs(factory, options)
    except MTLSignError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ModelError(
            f"The factory {path!r} raised {type(error).__name__}: {str(error)[:200]} "
            f"({frame.filename.rpartition('/')[2]}, line {frame.lineno}). Fix the factory.",
            field=field,
        ) from error


def call_with_accepted_kwargs(function: Callable[..., Any], options: Mapping[str, object]) -> Any:
    """Call `function` with those of `options` that its signature names; `**kwargs` receives none of them."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return function()
    accepted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return function(**{name: value for name, value in options.items() if name in accepted})
