"""The playground at `/` and the API reference at `/docs`. This server delivers every file of both.

A table lists the paths, so that no other file can be read. The pages need no key; the API calls they make do. Each can
be switched off by `SRPO_PAGES`.
"""

import hashlib
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.errors import NotFound
from server.state import State

SWAGGER_STYLES = "; style-src 'self' 'unsafe-inline'"  # Swagger UI writes style attributes
CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
MODULES = ("app", "client", "docs", "form", "gallery", "history", "snippets", "source", "state")
OWN_FILES = (*(f"{name}.js" for name in MODULES), "icon.svg", "style.css")
SWAGGER_FILES = ("swagger-ui-bundle.js", "swagger-ui.css")
FILES: dict[str, tuple[str, str, str]] = {  # path -> package, folder, file
    "/": ("server.playground", "static", "index.html"),
    "/docs": ("server.playground", "static", "docs.html"),
    **{f"/playground/{name}": ("server.playground", "static", name) for name in OWN_FILES},
    **{f"/docs/{name}": ("fastapi_offline", "static", name) for name in SWAGGER_FILES},
}
router = APIRouter(include_in_schema=False)


@cache
def read_page_file(path: str) -> tuple[bytes, str]:
    """The content of the file at `path`, and its ETag. Raises `NotFound`."""
    if path not in FILES:
        raise NotFound
    package, folder, name = FILES[path]
    content = (files(package) / folder / name).read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:16]}"'


@router.api_route("/", methods=["GET", "HEAD"])
@router.api_route("/docs", methods=["GET", "HEAD"])
@router.api_route("/docs/{name}", methods=["GET", "HEAD"])
@router.api_route("/playground/{name}", methods=["GET", "HEAD"])
def serve_page(request: Request, state: State) -> Response:
    """A page, or a file that it loads. Raises `NotFound`."""
    path = request.url.path
    check_page_enabled(path, state.settings.pages)
    content, etag = read_page_file(path)
    headers = {
        "etag": etag,
        "cache-control": "no-cache",  # the browser asks each time, mostly gets a 304, and sees an update at once
        "content-security-policy": page_policy(state.store.origin) + (SWAGGER_STYLES if path == "/docs" else ""),
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
    }
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=CONTENT_TYPES[FILES[path][-1].rpartition(".")[2]])


def page_policy(images: str | None) -> str:
    """What a page may load: its own server's files, and pictures from the origin `images` that this may send it to."""
    pictures = " ".join(("'self' blob: data:", *((images,) if images else ())))
    return (
        f"default-src 'self'; img-src {pictures}; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    )


def check_page_enabled(path: str, pages: tuple[str, ...]) -> None:
    """Raises `NotFound` where the page at `path` is switched off. What both pages load stays while one is shown."""
    page = "playground" if path == "/" else "docs" if path.startswith("/docs") else None
    if not pages or (page and page not in pages):
        raise NotFound("This page is switched off on this server (SRPO_PAGES).")
