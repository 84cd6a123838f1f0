"""Rendering of the pages, their security headers, and the static files that they use.

The content security policy allows nothing but the service's own style sheet and its one script.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from functools import lru_cache
from importlib import resources
from typing import Any

import jinja2
from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse
from markupsafe import Markup, escape

from mtlsign.reports.pages import template_environment

router = APIRouter(include_in_schema=False)
SCRIPT = "page.js"
_POWER_OF_TWO = re.compile(r"2\^-(\d+(?:\.\d+)?)")
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send forms with Origin: null
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@lru_cache(maxsize=1)
def _templates() -> jinja2.Environment:
    environment = template_environment("mtlsign.service.web")
    environment.filters["when"] = _format_time
    environment.filters["powers"] = _format_powers
    environment.globals["script_integrity"] = _integrity(SCRIPT)
    return environment


def _integrity(name: str) -> str:
    """Return the subresource integrity of a static file."""
    return "sha384-" + base64.b64encode(hashlib.sha384(_static_file(name)).digest()).decode()


def _static_file(name: str) -> bytes:
    return resources.files("mtlsign.service.web").joinpath("templates", name).read_bytes()


def _format_time(seconds: float | None) -> str:
    if seconds is None:
        return "not yet confirmed"
    return time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(seconds))


def _format_powers(text: str) -> Markup:
    """Escape a sentence and write its powers of two with exponents."""
    return Markup(_POWER_OF_TWO.sub("2<sup>−\\1</sup>", str(escape(text))))


def render(name: str, *, status: int = 200, refresh: bool = False, **values: Any) -> HTMLResponse:
    """Render one page.

    Args:
        name: template.
        status: HTTP status.
        refresh: whether the page reloads itself.
        values: variables of the template.
    """
    text = _templates().get_template(f"{name}.html.j2").render(refresh=refresh, **values)
    return HTMLResponse(text, status, headers=SECURITY_HEADERS)


def _static(name: str, media_type: str, max_age_s: int) -> Response:
    headers = {**SECURITY_HEADERS, "Cache-Control": f"max-age={max_age_s}"}
    return Response(_static_file(name), media_type=media_type, headers=headers)


@router.get("/page.js")
async def script() -> Response:
    """Return the script."""
    return _static(SCRIPT, "text/javascript", 0)  # its digest is in the page


@router.get("/style.css")
async def style() -> Response:
    """Return the style sheet."""
    return _static("style.css", "text/css", 3600)


@router.get("/icon.svg")
async def icon() -> Response:
    """Return the icon."""
    return _static("icon.svg", "image/svg+xml", 86_400)
