"""A hub on loopback: the paths, redirects and headers that huggingface_hub meets at huggingface.co, for a few files.

Small files are answered by `resolve` itself and have git's id as their ETag; large ones are redirected to a content
store and bear their sha256 as X-Linked-Etag. Faults are switched on by the attributes of `Hub`.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "5" * 40
TOKEN = "hf_loopback"
LFS = (".safetensors", ".bin", ".model", ".jpg")


@dataclass
class Hub:
    """Repositories by name, each a mapping of path to content, and what is wrong with the hub today."""

    repositories: Mapping[str, Mapping[str, bytes]]
    commits: Mapping[str, str] = field(default_factory=dict)  # of repositories that are not at COMMIT
    url: str = ""
    store: str = ""  # another host than `url`, as the content store is
    gated: set[str] = field(default_factory=set)
    members: set[str] = field(default_factory=lambda: {TOKEN})
    served: dict[str, bytes] = field(default_factory=dict)  # by sha256: what the store sends in place of the truth
    once: dict[str, bytes] = field(default_factory=dict)  # by sha256: what the store sends instead, the first time
    resumes: bool = True  # else the store sends the whole file whatever part is asked for
    stall_after: int | None = None  # bytes of a large file, then silence until `released`
    released: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range

    def commit(self, name: str) -> str:
        return self.commits.get(name, COMMIT)

    def contents(self) -> dict[str, bytes]:
        return {sha256(data): data for files in self.repositories.values() for data in files.values()}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sibling(path: str, data: bytes) -> dict[str, Any]:
    if not path.endswith(LFS):
        return {"rfilename": path, "size": len(data), "blobId": git_id(data)}
    pointer = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
    return {"rfilename": path, "size": len(data), "blobId": git_id(b"pointer to " + data[:9]), "lfs": pointer}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *_: Any) -> None: ...

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        match path.strip("/").split("/"):
            case ["api", "models", owner, name, "revision", *revision]:
                self.describe(f"{owner}/{name}", "/".join(revision))
            case [owner, name, "resolve", revision, *rest]:
                self.resolve(f"{owner}/{name}", revision, "/".join(rest))
            case ["store", digest]:
                self.store(digest)
            case _:
                self.refuse(404, "EntryNotFound", "not found")

    def describe(self, name: str, revision: str) -> None:
        files = self.hub.repositories.get(name)
        if files is None:
            return self.refuse(401, "RepoNotFound", "Repository not found")
        if revision not in (self.hub.commit(name), "main", "refs/pr/41"):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [sibling(path, data) for path, data in files.items()]
        gated = "auto" if name in self.hub.gated else False
        info = {"id": name, "modelId": name, "private": False, "gated": gated, "siblings": siblings}
        info["sha"] = self.hub.commit(name)
        return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def resolve(self, name: str, revision: str, path: str) -> None:
        if name in self.hub.gated:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if not token:
                return self.refuse(401, "GatedRepo", f"Access to model {name} is restricted.")
            if token not in self.hub.members:
                return self.refuse(403, "GatedRepo", f"Access to model {name} is restricted: ask for access.")
        data = self.hub.repositories.get(name, {}).get(path)
        if data is None or revision != self.hub.commit(name):
            return self.refuse(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        if path.endswith(LFS):
            linked = {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
            return self.send(302, b"", headers | linked | {"Location": f"{self.hub.store}/store/{sha256(data)}"})
        return self.send(200, data, headers | {"ETag": f'"{git_id(data)}"'})

    def store(self, digest: str) -> None:
        data = self.hub.served.get(digest, self.hub.contents()[digest])
        headers = {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range") if self.hub.resumes else None
        if digest in self.hub.once:
            return self.send(200, self.hub.once.pop(digest), headers)
        if asked is None:
            return self.send(200, data, headers)
        start = int(asked.removeprefix("bytes=").split("-")[0])
        if start >= len(data):
            return self.refuse(416, "", "Range Not Satisfiable")
        span = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.send(206, data[start:], headers | {"Content-Range": span})

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.hub.stall_after
        if limit is not None and len(data) > limit and self.path.startswith("/store/"):
            self.wfile.write(data[:limit])
            self.wfile.flush()
            self.hub.stalled.set()
            self.hub.released.wait(120)
            data = data[limit:]
        try:
            self.wfile.write(data)
        except ConnectionError:
            self.close_connection = True  # the client was killed


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """`hub` on a free loopback port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url, hub.store = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
