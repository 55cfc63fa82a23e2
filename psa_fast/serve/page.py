"""The local page of `psa-fast serve --ui`: drop a picture, ask, see the answer and its verdict."""

from __future__ import annotations

import html
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

HTML = Path(__file__).with_name("page.html")
SCRIPT = Path(__file__).with_name("page.js")
# nothing is loaded from elsewhere or sent elsewhere, and no other site may frame it
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def add_page(app: FastAPI, model_name: str, explains: bool = False) -> None:
    """Serve the page at `/` and its script at `/page.js`; both need no key, what the page asks for does.

    With `explains` it offers to explain verdicts.
    """
    name = html.escape(model_name, quote=True)
    told = f'<html lang="en" data-model="{name}"{" data-explains" if explains else ""}>'
    page = HTML.read_text(encoding="utf-8").replace('<html lang="en">', told, 1)
    script = SCRIPT.read_text(encoding="utf-8")

    @app.get("/")
    async def show() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=HEADERS)

    @app.get("/page.js")
    async def show_script() -> Response:
        return Response(script, media_type="text/javascript; charset=utf-8", headers=HEADERS)
