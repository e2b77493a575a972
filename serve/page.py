"""The playground at `/`: one static page, which asks this server alone and needs no key to be read."""

# No `from __future__ import annotations` here: FastAPI reads the annotations as objects.
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI, Response

FOLDER = Path(__file__).parent / "playground"
"""Where its files are."""
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/playground/style.css": ("style.css", "text/css; charset=utf-8"),
    "/playground/icon.svg": ("icon.svg", "image/svg+xml"),
    "/playground/script.js": ("script.js", "text/javascript; charset=utf-8"),
}
"""File and media type of each path."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""What a browser is told with each of them: nothing inline, nothing from elsewhere, in nobody's frame."""


def add_page(api: FastAPI) -> None:
    """Add the page's routes to an app; its files are read once, here."""
    for path, (name, media_type) in FILES.items():
        content = (FOLDER / name).read_bytes()

        api.add_api_route(path, _shower(content, media_type), methods=["GET", "HEAD"], include_in_schema=False)


def _shower(content: bytes, media_type: str) -> Callable[[], Response]:
    def show() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return show
