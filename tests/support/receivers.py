"""Receivers of webhooks on loopback ports: good, failing, redirecting, slow and lying ones."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Message:
    path: str
    headers: dict[str, str]
    body: str


class Receiver:
    """Answers with one status after the other, the last again and again; `lie` writes what it likes to the socket."""

    def __init__(
        self,
        *statuses: int,
        host: str = "127.0.0.1",
        port: int = 0,
        location: str = "",
        wait: threading.Event | None = None,
        lie: Callable[[Any], None] | None = None,
    ) -> None:
        self.messages: list[Message] = []
        outer, answers = self, [*statuses] or [204]

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"])).decode()
                outer.messages.append(Message(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                if wait is not None:
                    wait.wait(60)
                try:
                    if lie is not None:
                        lie(self.wfile)
                        return
                    self.send_response(answers.pop(0) if len(answers) > 1 else answers[0])
                    if location:
                        self.send_header("location", location)
                    self.send_header("content-length", "0")
                    self.end_headers()
                except OSError:
                    pass  # the sender has lost patience

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        self.place = f"{host}:{self._server.server_port}"
        self.url = f"http://{self.place}/hook?token=path-secret"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def __enter__(self) -> "Receiver":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
