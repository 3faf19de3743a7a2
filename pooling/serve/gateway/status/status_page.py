# SPDX-License-Identifier: Apache-2.0
"""The page at `/pool`: one HTML document without secrets that asks for the admin key and reads `/v1/pool/` with it.

Its parts lie in `static/` and are put together when the server starts. The browser runs nothing but these parts: the
content security policy names them by hash, and the page may talk to this server only.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

_SCRIPTS = ("status_model.js", "status_charts.js", "status_table.js", "status_page.js")
_STYLE_PLACE, _SCRIPT_PLACE = "/* status_page.css */", "/* status_page.js */"


class Page(NamedTuple):
    """What is served."""

    html: bytes
    headers: dict[str, str]


@cache
def page() -> Page:
    """The document and its headers."""
    parts = files("tokenpool.serve.gateway.status") / "static"
    style = (parts / "status_page.css").read_text()
    script = "\n".join((parts / name).read_text() for name in _SCRIPTS)
    html = (parts / "status_page.html").read_text().replace(_STYLE_PLACE, style).replace(_SCRIPT_PLACE, script)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    content = html.encode()
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
        "etag": f'"{hashlib.sha256(content).hexdigest()[:16]}"',
    }
    return Page(content, headers)


async def status_page(request: Request) -> Response:
    """The page, or 304 when the browser has it."""
    html, headers = page()
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(html, headers=headers, media_type="text/html")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
