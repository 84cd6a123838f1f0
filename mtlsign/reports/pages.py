"""Rendering of self-contained HTML pages from Jinja templates; every value is escaped."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jinja2


@lru_cache(maxsize=4)
def template_environment(package: str) -> jinja2.Environment:
    """Return the environment for the templates in the folder `templates` of `package`.

    It escapes all values, and a variable that a template uses without being given it is an error.
    """
    return jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.PackageLoader(package, "templates"),
    )  # fmt: skip


def render_page(template: str, **values: Any) -> str:
    """Render one report page from the template's file name and its variables."""
    return template_environment("mtlsign.reports").get_template(template).render(**values)
