"""The two pages: the playground at `/`, the API's reference at `/docs`. Every file of theirs comes from this process.

A table of paths, so that nothing else can be asked for. The pages need no key; what they call does.
"""

import hashlib
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.errors import NotFound

STRICT = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
SWAGGER = f"{STRICT}; style-src 'self' 'unsafe-inline'"  # Swagger UI writes style attributes
KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
MODULES = ("app", "client", "docs", "form", "gallery", "history", "snippets", "source", "state")
OURS = (*(f"{name}.js" for name in MODULES), "icon.svg", "style.css")
SWAGGERS = ("swagger-ui-bundle.js", "swagger-ui.css")
ADDRESSES: dict[str, tuple[str, str, str]] = {  # path -> package, folder, file
    "/": ("server.playground", "static", "index.html"),
    "/docs": ("server.playground", "static", "docs.html"),
    **{f"/playground/{name}": ("server.playground", "static", name) for name in OURS},
    **{f"/docs/{name}": ("fastapi_offline", "static", name) for name in SWAGGERS},
}
router = APIRouter(include_in_schema=False)


@cache
def content_of(path: str) -> tuple[bytes, str]:
    """The file at `path` and its ETag. Raises `NotFound`."""
    if path not in ADDRESSES:
        raise NotFound
    package, folder, name = ADDRESSES[path]
    content = (files(package) / folder / name).read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:16]}"'


@router.api_route("/", methods=["GET", "HEAD"])
@router.api_route("/docs", methods=["GET", "HEAD"])
@router.api_route("/docs/{name}", methods=["GET", "HEAD"])
@router.api_route("/playground/{name}", methods=["GET", "HEAD"])
def page(request: Request) -> Response:
    """A page, or a file of one."""
    path = request.url.path
    content, etag = content_of(path)
    headers = {
        "etag": etag,
        "cache-control": "no-cache",  # asked again each time, and mostly answered with 304: an update shows at once
        "content-security-policy": SWAGGER if path == "/docs" else STRICT,
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
    }
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=KINDS[ADDRESSES[path][-1].rpartition(".")[2]])
